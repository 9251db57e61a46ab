//! One instruction's text to what the interpreter executes.

use crate::body::Body;
use crate::instruction::{Access, Op, Register, Shuffle, ShuffleKind, Space};
use crate::opcode::{Type, binary, quaternary, ternary, unary};

/// An operand as it stands in the text.
#[derive(Debug)]
pub(crate) enum Operand<'a> {
    Word(&'a str),
    /// `a|b`
    Pair(&'a str, &'a str),
    /// `[a+1]`
    Address(&'a str, i64),
    /// `{a, b}`
    Vector(Vec<&'a str>),
}

const UNKNOWN: &str = "unknown instruction, or unknown operands";

pub(crate) fn decode(body: &mut Body<'_>, opcode: &str, operands: &[Operand<'_>]) -> Result<Op, String> {
    use Operand::Word;
    if let Some(op) = memory(body, opcode, operands)? {
        return Ok(op);
    }
    let destination = |body: &Body<'_>, name: &str, t: Type| body.destination(name, |declared| t.takes(declared));
    if let (Some((td, ta, f)), [Word(d), Word(a)]) = (unary(opcode), operands) {
        return Ok(Op::Unary { f, d: destination(body, d, td)?, a: body.source(a, ta)? });
    }
    if let (Some(([td, ta, tb], f)), [Word(d), Word(a), Word(b)]) = (binary(opcode), operands) {
        let d = destination(body, d, td)?;
        return Ok(Op::Binary { f, d, a: body.source(a, ta)?, b: body.source(b, tb)? });
    }
    if let (Some(([td, ta, tb, tc], f)), [Word(d), Word(a), Word(b), Word(c)]) = (ternary(opcode), operands) {
        let (d, a, b) = (destination(body, d, td)?, body.source(a, ta)?, body.source(b, tb)?);
        return Ok(Op::Ternary { f, d, a, b, c: body.source(c, tc)? });
    }
    if let (Some(([td, types @ ..], f)), [Word(d), Word(a), Word(b), Word(c), Word(e)]) = (quaternary(opcode), operands)
    {
        let (d, mut sources) = (destination(body, d, td)?, [0; 4]);
        for ((source, name), t) in sources.iter_mut().zip([a, b, c, e]).zip(types) {
            *source = body.source(name, t)?;
        }
        return Ok(Op::Quaternary { f, d, sources });
    }
    match (opcode, operands) {
        ("bar.sync", [Word("0")]) => Ok(Op::Barrier),
        ("ret", []) => Ok(Op::Return),
        ("shfl.sync.bfly.b32", _) => shuffle(body, ShuffleKind::Butterfly, operands),
        ("shfl.sync.down.b32", _) => shuffle(body, ShuffleKind::Down, operands),
        _ => Err(UNKNOWN.to_owned()),
    }
}

fn shuffle(body: &mut Body<'_>, kind: ShuffleKind, operands: &[Operand<'_>]) -> Result<Op, String> {
    let [to, Operand::Word(a), Operand::Word(b), Operand::Word(c), Operand::Word(mask)] = operands else {
        return Err(UNKNOWN.to_owned());
    };
    let (d, in_range) = match to {
        Operand::Word(d) => (d, None),
        Operand::Pair(d, p) => (d, Some(body.destination(p, |declared| declared == Type::Pred)?)),
        _ => return Err(UNKNOWN.to_owned()),
    };
    Ok(Op::Shuffle(Shuffle {
        kind,
        d: body.destination(d, |declared| Type::B32.takes(declared))?,
        in_range,
        a: body.source(a, Type::B32)?,
        b: body.source(b, Type::I32)?,
        c: body.source(c, Type::I32)?,
        mask: body.source(mask, Type::I32)?,
    }))
}

/// What a load or a store is about, by the last words of its opcode.
struct Element {
    size: usize,
    count: usize,
    /// None for single bytes, which any register takes.
    in_register: Option<Type>,
}

impl Element {
    fn named(name: &str) -> Option<Element> {
        let (count, name) = match name.split_once('.') {
            Some(("v2", name)) => (2, name),
            Some(("v4", name)) => (4, name),
            Some(_) => return None,
            None => (1, name),
        };
        let in_register = if name == "u8" { None } else { Some(Type::named(name).filter(|t| *t != Type::Pred)?) };
        let size = in_register.map_or(1, |t| t.bits() as usize / 8);
        (size * count <= 16).then_some(Element { size, count, in_register })
    }

    /// Integers may also be kept in wider registers.
    fn takes(&self, declared: Type) -> bool {
        let wider = declared.bits() > 8 * self.size as u32 && declared != Type::F32;
        wider && self.in_register != Some(Type::F32) || self.in_register.is_some_and(|t| t.takes(declared))
    }
}

/// Loads and stores; none if the opcode is another one.
fn memory(body: &mut Body<'_>, opcode: &str, operands: &[Operand<'_>]) -> Result<Option<Op>, String> {
    let spaces = [
        ("ld.global.nc.", Space::ReadOnly),
        ("ld.global.", Space::Global),
        ("ld.shared.", Space::Shared),
        ("st.global.", Space::Global),
        ("st.shared.", Space::Shared),
    ];
    if let Some(name) = opcode.strip_prefix("ld.param.") {
        return param(body, name, operands).map(Some);
    }
    let found = spaces.iter().find_map(|(prefix, space)| Some((opcode.strip_prefix(prefix)?, *space)));
    let Some((name, space)) = found else { return Ok(None) };
    let element = Element::named(name).ok_or(UNKNOWN)?;
    let (address, values) = match (opcode.starts_with("ld."), operands) {
        (true, [values, address]) | (false, [address, values]) => (address, values),
        _ => return Err(UNKNOWN.to_owned()),
    };
    let &Operand::Address(base, offset) = address else { return Err(UNKNOWN.to_owned()) };
    let access = Access { base: body.source(base, Type::B64)?, offset, size: element.size, count: element.count };
    let registers = registers(body, values, &element)?;
    Ok(Some(if opcode.starts_with("ld.") {
        Op::Load { from: space, access, d: registers }
    } else {
        Op::Store { to: space, access, a: registers }
    }))
}

fn registers(body: &Body<'_>, values: &Operand<'_>, element: &Element) -> Result<[Register; 4], String> {
    let single;
    let names = match values {
        Operand::Vector(names) => names,
        Operand::Word(name) => {
            single = vec![*name];
            &single
        }
        _ => return Err(UNKNOWN.to_owned()),
    };
    if names.len() != element.count {
        return Err("another number of registers".to_owned());
    }
    let mut registers = [0; 4];
    for (register, name) in registers.iter_mut().zip(names) {
        *register = body.destination(name, |declared| element.takes(declared))?;
    }
    Ok(registers)
}

fn param(body: &mut Body<'_>, name: &str, operands: &[Operand<'_>]) -> Result<Op, String> {
    let (Some(t), [Operand::Word(d), Operand::Address(param, 0)]) = (Type::named(name), operands) else {
        return Err(UNKNOWN.to_owned());
    };
    let d = body.destination(d, |declared| t.takes(declared))?;
    Ok(Op::Unary { f: |a| a, d, a: body.param(param, t.bits() as usize / 8)? })
}
