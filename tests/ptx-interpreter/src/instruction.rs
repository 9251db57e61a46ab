//! A kernel, decoded: what a launch walks through.

/// A kernel.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it is called with.
    pub params: Vec<Param>,
    /// Its variables in shared memory.
    pub shared: Vec<SharedVariable>,
    /// Threads that a thread block may have (`.maxntid`).
    pub max_threads: u32,
    pub(crate) code: Vec<Instruction>,
    /// Names of the registers.
    pub(crate) registers: Vec<String>,
    /// Registers that hold something from the start.
    pub(crate) fixed: Vec<(Register, Fixed)>,
}

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// In bytes: 4 or 8.
    pub size: usize,
}

/// A variable in shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedVariable {
    /// Its name.
    pub name: String,
    /// Where it is, in the shared window.
    pub address: u64,
    /// In bytes.
    pub size: u64,
}

/// A register's number within its kernel. Constants, parameters and special registers have numbers too.
pub(crate) type Register = u16;

/// What a register holds from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fixed {
    Constant(u64),
    Param(usize),
    /// Along an axis.
    Tid(usize),
    Ctaid(usize),
    Ntid(usize),
    Nctaid(usize),
}

#[derive(Debug)]
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Option<Guard>,
    pub line: u32,
}

/// `@%p` or `@!%p`: the instruction is done if the predicate is `expected`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard {
    pub predicate: Register,
    pub expected: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Unary { f: fn(u64) -> u64, d: Register, a: Register },
    Binary { f: fn(u64, u64) -> u64, d: Register, a: Register, b: Register },
    Ternary { f: fn(u64, u64, u64) -> u64, d: Register, a: Register, b: Register, c: Register },
    Quaternary { f: fn(u64, u64, u64, u64) -> u64, d: Register, sources: [Register; 4] },
    Load { from: Space, access: Access, d: [Register; 4] },
    Store { to: Space, access: Access, a: [Register; 4] },
    Shuffle(Shuffle),
    Barrier,
    Branch(usize),
    Return,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    /// Global, through the cache that sees no stores (`.nc`).
    ReadOnly,
    Shared,
}

/// The bytes that a load or a store is about: `count` numbers of `size` bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub base: Register,
    pub offset: i64,
    pub size: usize,
    pub count: usize,
}

/// `shfl.sync`
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shuffle {
    pub kind: ShuffleKind,
    pub d: Register,
    /// Whether the source lane was in range.
    pub in_range: Option<Register>,
    pub a: Register,
    pub b: Register,
    pub c: Register,
    pub mask: Register,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleKind {
    Butterfly,
    Down,
}
