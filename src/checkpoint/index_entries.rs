//! An index of tensors read entry by entry: one of any length takes no memory.

use std::io::Read;

use serde::de::IgnoredAny;

use crate::error::{Error, IoContext, Result};
use crate::json_text::{Failure, JsonText};
use crate::store::{Location, Reader};

/// Hands on the entries of the index that lies there, in its order: a tensor's name and its file's.
///
/// # Errors
/// When it can't be read, or is no index; what was handed on until then is void.
pub(crate) fn read_entries(location: &Location, each: &mut dyn FnMut(&str, &str)) -> Result<()> {
    let path = location.path();
    let file = location.open().at(path, "open it")?;
    let read = entries(Reader::new(&*file), &mut |tensor, file| each(&tensor, &file));
    read.map_err(|failure| match failure {
        Failure::Io(source) => Error::Io { path: path.to_owned(), action: "read it", source },
        Failure::Json(why) => Error::malformed(path, format!("not an index of tensors: {why}")),
    })
}

/// The same, of a text.
pub(super) fn entries(text: impl Read, each: &mut dyn FnMut(String, String)) -> Result<(), Failure> {
    let mut text = JsonText::new(text, 0);
    let mut found = false;
    // Other keys are ignored.
    text.object("an object with a weight_map", &mut |key, text| match key.as_str() {
        "weight_map" if found => Err(text.defect("duplicate field `weight_map`")),
        "weight_map" => {
            found = true;
            text.object("files by tensor", &mut |tensor, text| text.value().map(|file| each(tensor, file)))
        }
        _ => text.value::<IgnoredAny>().map(|_| ()),
    })?;
    match found {
        true => text.end(),
        false => Err(text.defect("missing field `weight_map`")),
    }
}
