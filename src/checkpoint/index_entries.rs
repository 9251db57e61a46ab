//! An index of tensors read entry by entry: one of any length takes no memory.

use std::fmt;
use std::io::{self, BufReader};

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, IoContext, Result};
use crate::store::{Location, Reader};

/// Bytes that are read at once.
const BUFFER: usize = 1 << 16;

/// Takes a tensor's name and its file's.
type Each<'a> = &'a mut dyn FnMut(&str, &str);

/// Hands on the entries of the index that lies there, in its order.
///
/// # Errors
/// When it can't be read, or is no index; what was handed on until then is void.
pub(crate) fn read_entries(location: &Location, each: Each<'_>) -> Result<()> {
    let path = location.path();
    let file = location.open().at(path, "open it")?;
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(BUFFER, Reader::new(&*file)));
    let read = Whole(each).deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|error| match error.is_io() {
        true => Error::Io { path: path.to_owned(), action: "read it", source: io::Error::from(error) },
        false => Error::malformed(path, format!("not an index of tensors: {error}")),
    })
}

/// The index; other keys are ignored.
struct Whole<'a>(Each<'a>);

impl<'de> DeserializeSeed<'de> for Whole<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Whole<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = false;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "weight_map" if found => return Err(de::Error::custom("duplicate field `weight_map`")),
                "weight_map" => map.next_value_seed(WeightMap(&mut *self.0))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
            found |= key == "weight_map";
        }
        if found { Ok(()) } else { Err(de::Error::custom("missing field `weight_map`")) }
    }
}

/// Tensors and their files.
struct WeightMap<'a>(Each<'a>);

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("files by tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((tensor, file)) = map.next_entry::<String, String>()? {
            (self.0)(&tensor, &file);
        }
        Ok(())
    }
}
