//! A kernel's body: declarations, labels, scopes, statements.

use std::collections::HashMap;

use crate::decode::{Operand, decode};
use crate::instruction::{Entry, Fixed, Guard, Instruction, Op, Register, SharedVariable};
use crate::opcode::Type;
use crate::shared;
use crate::token::Cursor;

/// A kernel while its body is read.
pub(crate) struct Body<'a> {
    entry: Entry,
    params: Vec<&'a str>,
    /// Registers by name, innermost scope last.
    scopes: Vec<HashMap<String, (Register, Type)>>,
    labels: HashMap<&'a str, usize>,
    /// Branches, by instruction; filled in when all labels are known.
    branches: Vec<(usize, &'a str)>,
}

impl<'a> Body<'a> {
    pub fn new(entry: Entry, params: Vec<&'a str>) -> Body<'a> {
        let scopes = vec![HashMap::new()];
        Body { entry, params, scopes, labels: HashMap::new(), branches: Vec::new() }
    }

    /// Reads up to the closing brace.
    pub fn read(mut self, cursor: &mut Cursor<'a>) -> Result<Entry, String> {
        while !self.scopes.is_empty() {
            cursor.began = cursor.line();
            match cursor.peek() {
                ".reg" => self.registers(cursor)?,
                ".shared" => self.shared(cursor)?,
                ".pragma" => self.pragma(cursor)?,
                "{" => {
                    cursor.next()?;
                    self.scopes.push(HashMap::new());
                }
                "}" => {
                    cursor.next()?;
                    self.scopes.pop();
                }
                _ => self.statement(cursor)?,
            }
        }
        self.finish(cursor)
    }

    fn finish(mut self, cursor: &mut Cursor<'a>) -> Result<Entry, String> {
        for (at, label) in self.branches {
            cursor.began = self.entry.code[at].line;
            let target = *self.labels.get(label).ok_or_else(|| format!("no label `{label}`"))?;
            if target >= self.entry.code.len() {
                return Err(format!("nothing stands after label `{label}`"));
            }
            self.entry.code[at].op = Op::Branch(target);
        }
        let last = self.entry.code.last();
        let ends = last.is_some_and(|last| last.guard.is_none() && matches!(last.op, Op::Return | Op::Branch(_)));
        if ends { Ok(self.entry) } else { Err(format!("`{}` runs past its end", self.entry.name)) }
    }

    fn registers(&mut self, cursor: &mut Cursor<'a>) -> Result<(), String> {
        cursor.expect(".reg")?;
        let name = cursor.next()?;
        let declared = name.strip_prefix('.').and_then(Type::named).ok_or_else(|| format!("unknown type `{name}`"))?;
        loop {
            let name = cursor.next()?;
            if cursor.take("<") {
                for i in 0..cursor.number::<u32>()? {
                    self.register(format!("{name}{i}"), declared)?;
                }
                cursor.expect(">")?;
            } else {
                self.register(name.to_owned(), declared)?;
            }
            if !cursor.take(",") {
                return cursor.expect(";");
            }
        }
    }

    fn register(&mut self, name: String, declared: Type) -> Result<(), String> {
        let number = self.number(name.clone())?;
        let scope = self.scopes.last_mut().ok_or("outside of a body")?;
        match scope.insert(name, (number, declared)) {
            None => Ok(()),
            Some(_) => Err("a register is declared twice".to_owned()),
        }
    }

    /// A number for one more register.
    fn number(&mut self, name: String) -> Result<Register, String> {
        let number = Register::try_from(self.entry.registers.len()).map_err(|_| "too many registers")?;
        self.entry.registers.push(name);
        Ok(number)
    }

    fn shared(&mut self, cursor: &mut Cursor<'a>) -> Result<(), String> {
        for word in [".shared", ".align"] {
            cursor.expect(word)?;
        }
        let align: u64 = cursor.number()?;
        cursor.expect(".b8")?;
        let name = cursor.next()?.to_owned();
        cursor.expect("[")?;
        let size = cursor.number()?;
        cursor.expect("]")?;
        cursor.expect(";")?;
        let address = shared::place(&self.entry.shared, align);
        self.entry.shared.push(SharedVariable { name, address, size });
        Ok(())
    }

    fn pragma(&mut self, cursor: &mut Cursor<'a>) -> Result<(), String> {
        for word in [".pragma", "\"nounroll\"", ";"] {
            cursor.expect(word)?;
        }
        Ok(())
    }

    /// A label or an instruction.
    fn statement(&mut self, cursor: &mut Cursor<'a>) -> Result<(), String> {
        let line = cursor.line();
        let guard = if cursor.take("@") { Some(self.guard(cursor)?) } else { None };
        let opcode = cursor.next()?;
        if guard.is_none() && cursor.take(":") {
            return match self.labels.insert(opcode, self.entry.code.len()) {
                None => Ok(()),
                Some(_) => Err(format!("label `{opcode}` stands twice")),
            };
        }
        let operands = operands(cursor)?;
        let op = match (opcode, &operands[..]) {
            ("bra", &[Operand::Word(label)]) => self.branch(label),
            ("bra.uni", &[Operand::Word(label)]) if guard.is_none() => self.branch(label),
            _ => decode(self, opcode, &operands).map_err(|message| format!("`{opcode}`: {message}"))?,
        };
        self.entry.code.push(Instruction { op, guard, line });
        Ok(())
    }

    fn branch(&mut self, label: &'a str) -> Op {
        self.branches.push((self.entry.code.len(), label));
        Op::Branch(usize::MAX)
    }

    fn guard(&mut self, cursor: &mut Cursor<'a>) -> Result<Guard, String> {
        let expected = u64::from(!cursor.take("!"));
        let predicate = self.destination(cursor.next()?, |declared| declared == Type::Pred)?;
        Ok(Guard { predicate, expected })
    }

    /// A declared register whose type `fits`.
    pub fn destination(&self, name: &str, fits: impl Fn(Type) -> bool) -> Result<Register, String> {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        match found {
            Some(&(register, declared)) if fits(declared) => Ok(register),
            Some(_) => Err(format!("`{name}` is of another type")),
            None => Err(format!("unknown name `{name}`")),
        }
    }

    /// A register, a special register, a number, or a shared variable's address.
    pub fn source(&mut self, name: &str, wanted: Type) -> Result<Register, String> {
        if let Some(variable) = self.entry.shared.iter().find(|variable| variable.name == name) {
            let address = Fixed::Constant(variable.address);
            return if wanted == Type::B64 {
                self.fixed(name, address)
            } else {
                Err("an address has 64 bits".to_owned())
            };
        }
        if name.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
            return self.fixed(name, Fixed::Constant(immediate(name, wanted)?));
        }
        match special(name) {
            Some(special) if wanted == Type::I32 => self.fixed(name, special),
            _ => self.destination(name, |declared| wanted.takes(declared)),
        }
    }

    /// The parameter of this name, if it has `size` bytes.
    pub fn param(&mut self, name: &str, size: usize) -> Result<Register, String> {
        let index = self.params.iter().position(|param| *param == name).ok_or("unknown parameter")?;
        if self.entry.params[index].size != size {
            return Err("the parameter has another size".to_owned());
        }
        self.fixed(name, Fixed::Param(index))
    }

    /// The register that holds this from the start.
    fn fixed(&mut self, name: &str, fixed: Fixed) -> Result<Register, String> {
        if let Some((register, _)) = self.entry.fixed.iter().find(|(_, other)| *other == fixed) {
            return Ok(*register);
        }
        let register = self.number(name.to_owned())?;
        self.entry.fixed.push((register, fixed));
        Ok(register)
    }
}

fn operands<'a>(cursor: &mut Cursor<'a>) -> Result<Vec<Operand<'a>>, String> {
    let mut operands = Vec::new();
    while !cursor.take(";") {
        if !operands.is_empty() {
            cursor.expect(",")?;
        }
        operands.push(operand(cursor)?);
    }
    Ok(operands)
}

fn operand<'a>(cursor: &mut Cursor<'a>) -> Result<Operand<'a>, String> {
    if cursor.take("[") {
        let base = cursor.next()?;
        let offset = if cursor.take("+") { cursor.number()? } else { 0 };
        cursor.expect("]")?;
        return Ok(Operand::Address(base, offset));
    }
    if cursor.take("{") {
        let mut names = vec![cursor.next()?];
        while cursor.take(",") {
            names.push(cursor.next()?);
        }
        cursor.expect("}")?;
        return Ok(Operand::Vector(names));
    }
    let word = cursor.next()?;
    Ok(if cursor.take("|") { Operand::Pair(word, cursor.next()?) } else { Operand::Word(word) })
}

/// A number in the text: `0f` and an f32's bits, `0d` and an f64's, or an integer that fits.
fn immediate(text: &str, wanted: Type) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no number of that type");
    if wanted == Type::F32 {
        let digits = text.strip_prefix("0f").filter(|digits| digits.len() == 8).ok_or_else(wrong)?;
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    if wanted == Type::F64 {
        let digits = text.strip_prefix("0d").filter(|digits| digits.len() == 16).ok_or_else(wrong)?;
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let value = match text.strip_prefix("0x") {
        Some(digits) => i128::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let value = value.map_err(|_| wrong())?;
    let range = 1i128 << wanted.bits();
    if (-range / 2..range).contains(&value) { Ok((value & (range - 1)) as u64) } else { Err(wrong()) }
}

fn special(name: &str) -> Option<Fixed> {
    let (name, axis) = name.strip_prefix('%')?.split_once('.')?;
    let axis = ["x", "y", "z"].iter().position(|known| *known == axis)?;
    Some(match name {
        "tid" => Fixed::Tid(axis),
        "ctaid" => Fixed::Ctaid(axis),
        "ntid" => Fixed::Ntid(axis),
        "nctaid" => Fixed::Nctaid(axis),
        _ => return None,
    })
}
