//! A module's text: its directives and the frames of its kernels.

use crate::body::Body;
use crate::instruction::{Entry, Param};
use crate::opcode::Type;
use crate::token::Cursor;

/// A PTX module.
#[derive(Debug)]
pub struct Module {
    entries: Vec<Entry>,
}

impl Module {
    /// Reads a module.
    ///
    /// # Errors
    /// At anything that is not known, with its line.
    pub fn parse(text: &str) -> Result<Module, String> {
        let mut cursor = Cursor::new(text)?;
        let mut entries = Vec::new();
        while !cursor.peek().is_empty() {
            cursor.began = cursor.line();
            let parsed = top_level(&mut cursor);
            entries.extend(parsed.map_err(|message| format!("line {}: {message}", cursor.began))?);
        }
        Ok(Module { entries })
    }

    /// The kernel of this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// All kernels, as they stand in the text.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}

fn top_level(cursor: &mut Cursor<'_>) -> Result<Option<Entry>, String> {
    match cursor.next()? {
        ".version" | ".target" | ".address_size" => {
            cursor.next()?;
        }
        // Constants that the compiler left behind. Their names mean nothing to the kernels' bodies.
        ".global" => while cursor.next()? != ";" {},
        ".visible" => {
            cursor.expect(".entry")?;
            return entry(cursor).map(Some);
        }
        ".entry" => return entry(cursor).map(Some),
        other => return Err(format!("unknown directive `{other}`")),
    }
    Ok(None)
}

fn entry(cursor: &mut Cursor<'_>) -> Result<Entry, String> {
    let name = cursor.next()?.to_owned();
    let (mut params, mut param_names) = (Vec::new(), Vec::new());
    if cursor.take("(") {
        while !cursor.take(")") {
            cursor.take(",");
            cursor.expect(".param")?;
            let size = cursor.next()?.strip_prefix('.').and_then(Type::named).map(|t| t.bits() / 8);
            let size = size.filter(|size| [4, 8].contains(size)).ok_or("unknown type of a parameter")?;
            params.push(Param { size: size as usize });
            param_names.push(cursor.next()?);
        }
    }
    let mut max_threads = 1024;
    if cursor.take(".maxntid") {
        max_threads = cursor.number()?;
        while cursor.take(",") {
            max_threads *= cursor.number::<u32>()?;
        }
    }
    if cursor.take(".minnctapersm") {
        cursor.number::<u32>()?; // How many should fit on a multiprocessor: nothing to us.
    }
    let entry = Entry {
        name,
        params,
        shared: Vec::new(),
        max_threads,
        code: Vec::new(),
        registers: Vec::new(),
        fixed: Vec::new(),
    };
    cursor.expect("{")?;
    Body::new(entry, param_names).read(cursor)
}
