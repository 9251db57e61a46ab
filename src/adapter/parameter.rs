//! A parameter of the model, put together from what the base has of it: the parameter itself, a tensor for each expert and matrix, or
//! a tensor of all experts for each matrix.

use super::base::{Base, Found, Piece};
use crate::read::MAX_EXPERTS;

/// A parameter of all experts, as the model has it; one that isn't of experts has a single one.
pub(super) struct Parameter {
    /// Its full name.
    pub name: String,
    pub experts: u64,
    /// Of each expert's matrix.
    pub rows: u64,
    /// Likewise.
    pub columns: u64,
    /// Where it is; not empty.
    pub parts: Vec<Part>,
}

/// Where a part of a parameter is.
pub(super) struct Part {
    /// The number of the tensor among the base's.
    pub input: usize,
    /// The expert whose it is; all experts' if none.
    pub expert: Option<u64>,
    /// The first row of each expert's matrix that is in it.
    pub first_row: u64,
    /// How many are.
    pub rows: u64,
    /// Whether it has rows and columns exchanged.
    pub transposed: bool,
}

impl Parameter {
    /// What was found under a name.
    ///
    /// # Errors
    /// When it is no parameter of two or three dimensions, or pieces of it are missing or don't fit each other.
    pub(super) fn of(base: &Base<'_>, name: &str, found: &Found<'_>) -> Result<Parameter, String> {
        let parameter = match *found {
            Found::Tensor(number) => Parameter::whole(base, name, number)?,
            Found::Pieces(pieces) => Parameter::of_pieces(base, name, pieces)?,
        };
        match parameter.experts <= MAX_EXPERTS {
            true => Ok(parameter),
            false => {
                Err(format!("{name:?} of the base has {} experts; expected {MAX_EXPERTS} at most", parameter.experts))
            }
        }
    }

    /// One that the base has as the model does.
    fn whole(base: &Base<'_>, name: &str, number: usize) -> Result<Parameter, String> {
        base.check_is_a_float(number)?;
        let input = &base.inputs[number];
        let (expert, experts, rows, columns) = match input.shape[..] {
            [experts, rows, columns] => (None, experts, rows, columns),
            [rows, columns] => (Some(0), 1, rows, columns),
            _ => {
                return Err(format!(
                    "{:?} of the base has the shape {:?}; expected 2 or 3 dimensions",
                    input.name, input.shape
                ));
            }
        };
        let part = Part { input: number, expert, first_row: 0, rows, transposed: false };
        Ok(Parameter { name: name.to_owned(), experts, rows, columns, parts: vec![part] })
    }

    /// One that the base has in other tensors.
    fn of_pieces(base: &Base<'_>, name: &str, pieces: &[Piece]) -> Result<Parameter, String> {
        let mut experts = 0;
        // Rows and columns of each of an expert's matrices.
        let mut matrices: Vec<Option<[u64; 2]>> = Vec::new();
        let mut parts = Vec::new();
        for piece in pieces {
            let tensor = &base.inputs[piece.input];
            let wrong = |why: String| format!("{:?}, of which the base's {name:?} is made: {why}", tensor.name);
            let (matrix, transposed) = matrix(base, piece).map_err(wrong)?;
            experts = experts.max(piece.expert.map_or(tensor.shape[0], |expert| expert as u64 + 1));
            matrices.resize(matrices.len().max(piece.which + 1), None);
            if let Some(other) = matrices[piece.which].replace(matrix).filter(|other| *other != matrix) {
                return Err(wrong(format!("its shape is {:?}, and others' matrices are {other:?}", tensor.shape)));
            }
            let expert = piece.expert.map(|expert| expert as u64);
            parts.push((piece.which, Part { input: piece.input, expert, first_row: 0, rows: matrix[0], transposed }));
        }
        let there: u64 = parts.iter().map(|(_, part)| if part.expert.is_some() { 1 } else { experts }).sum();
        let whole = matrices.iter().copied().collect::<Option<Vec<_>>>().unwrap_or_default();
        let columns = whole.first().map_or(0, |matrix| matrix[1]);
        let fit =
            whole.iter().all(|matrix| matrix[1] == columns) && Some(there) == experts.checked_mul(whole.len() as u64);
        if whole.is_empty() || !fit {
            return Err(format!(
                "the base's {name:?} isn't whole: it has {there} matrices of {experts} experts, or they don't fit"
            ));
        }
        for (which, part) in &mut parts {
            part.first_row = whole[..*which].iter().map(|matrix| matrix[0]).sum();
        }
        let rows = whole.iter().map(|matrix| matrix[0]).sum();
        let parts = parts.into_iter().map(|(_, part)| part).collect();
        Ok(Parameter { name: name.to_owned(), experts, rows, columns, parts })
    }
}

/// Rows and columns of an expert's matrix in the model, and whether the tensor has them exchanged.
fn matrix(base: &Base<'_>, piece: &Piece) -> Result<([u64; 2], bool), String> {
    base.check_is_a_float(piece.input)?;
    let shape = &base.inputs[piece.input].shape;
    let transposed = match piece.transposed_unless {
        Some(expected) => expected.is_transposed(base.source.config.as_ref(), shape)?,
        None => false,
    };
    match (piece.expert, &shape[..]) {
        (Some(_), &[rows, columns]) => Ok(([rows, columns], false)),
        (None, &[_, columns, rows]) if transposed => Ok(([rows, columns], true)),
        (None, &[_, rows, columns]) => Ok(([rows, columns], false)),
        _ => Err(format!("its shape is {shape:?}")),
    }
}
