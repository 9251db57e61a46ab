//! Matrices that no table knows: remote code, new architectures, modules that were added to a known one.
//!
//! Such a matrix is quantized if it certainly is a Linear: its module is called like Linears everywhere are, or the
//! matrices beside it say so; and neither a word in its name nor the number of its rows says that it is something else. All
//! others are kept, by doubt, and listed so that they can be included.

use std::borrow::Cow;

use crate::models::evidence::{Count, Evidence, is_in_a_layer};
use crate::models::roles::Role;
use crate::models::words;

/// Last names of modules that are an nn.Linear in every model type of transformers that has them; `scripts/make linears`.
const PROJECTIONS: &str = include_str!("data/projections.txt");

/// The same of multi-token prediction layers, which transformers doesn't have.
const OF_PREDICTION: &[&str] = &["eh_proj", "mtp_linear_proj"];

/// Fewer rows make a gate, a score or a label, not a projection.
const FEWEST_ROWS: u64 = 8;

/// That a parameter beside experts, or as large as all of a layer's, may be theirs.
pub(super) fn unknown_experts() -> Doubt {
    Doubt::new(Role::FusedExperts, "it may be all of a layer's experts in one, under a name that isn't known")
}

/// Why a matrix may be no Linear's.
#[derive(Debug, PartialEq)]
pub(super) struct Doubt {
    /// What it may be instead.
    pub role: Role,
    /// A short sentence for people.
    pub reason: Cow<'static, str>,
}

impl Doubt {
    fn new(role: Role, why: &str) -> Doubt {
        Doubt { role, reason: format!("in doubt: {why}; kept in its dtype").into() }
    }
}

/// What speaks against the weight of `module`, of this many rows and columns, being a Linear's.
pub(super) fn doubt(module: &str, shape: [u64; 2], evidence: &Evidence<'_>) -> Option<Doubt> {
    if let Some((part, says, role)) = words::objection(module) {
        return Some(Doubt::new(role, &format!("{part:?} in its name says that it is {says}")));
    }
    by_rows(module, shape, evidence).or_else(|| {
        if lies_in_out(module, shape, evidence) {
            let why = "its bias has as many elements as it has columns, so it may be stored as [in, out]";
            return Some(Doubt::new(Role::Conv1d, why));
        }
        let certain = is_named_like_a_linear(module) || is_certain_by_shape(module, shape, evidence);
        let why = "no Linear is known by this name, and nothing beside it says that it is one";
        (!certain).then(|| Doubt::new(Role::Unknown, why))
    })
}

/// Its rows are counted in config.json, or very few for a name that nobody knows.
fn by_rows(module: &str, [rows, _]: [u64; 2], evidence: &Evidence<'_>) -> Option<Doubt> {
    let named = is_named_like_a_linear(module);
    if rows < FEWEST_ROWS && !named {
        let rows = if rows == 1 { "one row".to_owned() } else { format!("{rows} rows") };
        return Some(Doubt::new(Role::Unknown, &format!("it has {rows} only, like a gate or a score")));
    }
    let in_doubt = |role, why: &str| Some(Doubt::new(role, &format!("it has {rows} rows, {why}")));
    let Some((count, key)) = evidence.count(rows) else {
        let like_a_table = !is_in_a_layer(module) && evidence.is_a_tables(rows) && !evidence.is_width(rows);
        return like_a_table.then(|| in_doubt(Role::OutputHead, "as an embedding has")).flatten();
    };
    let (role, other) = match count {
        Count::Vocabulary => (Role::OutputHead, false),
        Count::Labels => (Role::OutputHead, has_twin(module, rows, evidence)),
        Count::Experts => (Role::Router, has_twin(module, rows, evidence)),
        // As many positions as a hidden state has elements are common.
        Count::Positions => (Role::Embedding, named),
    };
    let coincidence = other || evidence.is_width(rows);
    if coincidence { None } else { in_doubt(role, &format!("which is config.json's {key}")) }
}

/// Whether a Linear beside it has as many rows: keys and values have, heads and routers stand alone.
fn has_twin(module: &str, rows: u64, evidence: &Evidence<'_>) -> bool {
    evidence.beside(module).any(|(name, [others, _])| others == rows && is_named_like_a_linear(name))
}

fn bias_len(module: &str, evidence: &Evidence<'_>) -> Option<u64> {
    match evidence.shape(&format!("{module}.bias"))? {
        [len] => Some(*len),
        _ => None,
    }
}

/// Whether its bias says that it is stored the other way round, as GPT-2's Conv1D is.
fn lies_in_out(module: &str, [rows, columns]: [u64; 2], evidence: &Evidence<'_>) -> bool {
    rows != columns && bias_len(module, evidence) == Some(columns)
}

/// The last part that isn't a number, in lower case, is a Linear's everywhere in transformers.
fn is_named_like_a_linear(module: &str) -> bool {
    let last = module.rsplit('.').find(|part| !words::is_number(part)).unwrap_or("").to_ascii_lowercase();
    OF_PREDICTION.contains(&last.as_str()) || is_projection(&last)
}

/// Whether modules of this last name are Linears in all of transformers.
fn is_projection(name: &str) -> bool {
    // Sorted, and looked up in place: a few hundred lines.
    let (mut rest, line) = (PROJECTIONS, |text: &str| text.find('\n').unwrap_or(text.len()));
    while !rest.is_empty() {
        let middle = rest[..rest.len() / 2].rfind('\n').map_or(0, |at| at + 1);
        let found = &rest[middle..middle + line(&rest[middle..])];
        match name.cmp(found) {
            std::cmp::Ordering::Equal => return true,
            std::cmp::Ordering::Less => rest = &rest[..middle],
            std::cmp::Ordering::Greater => rest = rest[middle + found.len()..].trim_start_matches('\n'),
        }
    }
    false
}

/// In a layer, with a bias of its rows; or between Linears that it shares its inputs or outputs with; or an expert like another.
fn is_certain_by_shape(module: &str, shape: [u64; 2], evidence: &Evidence<'_>) -> bool {
    if !is_in_a_layer(module) {
        return false;
    }
    let [rows, columns] = shape;
    if rows != columns && bias_len(module, evidence) == Some(rows) {
        return true;
    }
    if let Some(others) = another_expert(module) {
        return evidence.matrix(&others) == Some(shape);
    }
    let linears = evidence.beside(module).filter(|(name, _)| is_named_like_a_linear(name));
    linears.map(|(_, shape)| shape).any(|[out, into]| {
        // Of queries, keys and values in one, there are three.
        let takes_the_same = columns == into && (rows == out || rows == columns.saturating_mul(3));
        let follows_it = columns == out && evidence.is_width(rows);
        takes_the_same || follows_it
    })
}

/// The same module of another expert.
fn another_expert(module: &str) -> Option<String> {
    let at = module.find(".experts.")? + ".experts.".len();
    let (number, rest) = module[at..].split_once('.')?;
    let other = if number == "0" { "1" } else { "0" };
    words::is_number(number).then(|| format!("{}{other}.{rest}", &module[..at]))
}
