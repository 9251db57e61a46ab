//! Reading manifests, of this version's schema and of older ones.

use std::io::{self, BufReader, Read};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Manifest, SCHEMA_VERSION, Tool, v1};
use crate::error::{Error, IoContext, Result};
use crate::store::{HashingReader, Location, Reader, Sha256Hash};

/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;

/// What tells how to read the rest.
#[derive(Deserialize)]
struct Version {
    schema_version: u32,
    tool: Tool,
}

impl Manifest {
    /// The manifest in a file, whichever version of prequant up to this one wrote it.
    ///
    /// # Errors
    /// When it can't be read, is no manifest, or a newer version's.
    pub fn read(location: &Location) -> Result<Manifest> {
        Ok(Manifest::read_and_hash(location)?.0)
    }

    /// The same with the file's SHA-256.
    pub(crate) fn read_and_hash(location: &Location) -> Result<(Manifest, Sha256Hash)> {
        let path = location.path();
        let file = location.open().at(path, "open it")?;
        read(|| Reader::new(&*file)).at(path, "read it")?.map_err(|why| Error::malformed(path, why))
    }

    /// A manifest's text.
    ///
    /// # Errors
    /// Why it is none that this version reads.
    pub fn parse(json: &[u8]) -> Result<Manifest, String> {
        let read = read(|| json).map_err(|error| error.to_string())?;
        read.map(|(manifest, _)| manifest)
    }
}

/// Reads it as what this version writes; if it isn't that, again for its version, and as what that has. Memory is that of the
/// manifest, not of its text.
fn read<R: Read>(from_start: impl Fn() -> R) -> io::Result<Result<(Manifest, Sha256Hash), String>> {
    if let Ok((manifest, sha256)) = parse::<Manifest>(from_start())?
        && manifest.schema_version == SCHEMA_VERSION
    {
        return Ok(Ok((manifest, sha256)));
    }
    let Version { schema_version, tool } = match parse::<Version>(from_start())? {
        Ok((version, _)) => version,
        Err(why) => return Ok(Err(why)),
    };
    match schema_version {
        1 => {
            let found = parse::<v1::Manifest>(from_start())?;
            Ok(found.and_then(|(manifest, sha256)| Ok((manifest.try_into()?, sha256))))
        }
        SCHEMA_VERSION => parse(from_start()),
        _ => Ok(Err(format!(
            "{} {} wrote it, with schema version {schema_version}; this is {} and reads versions 1 to {SCHEMA_VERSION}: use \
             the version that wrote it, or a newer one",
            tool.name,
            tool.version,
            env!("CARGO_PKG_VERSION"),
        ))),
    }
}

/// A value with the SHA-256 of its text, or why it isn't one.
fn parse<T: DeserializeOwned>(input: impl Read) -> io::Result<Result<(T, Sha256Hash), String>> {
    let mut reader = BufReader::with_capacity(BUFFER, HashingReader::new(input));
    let mut deserializer = serde_json::Deserializer::from_reader(&mut reader);
    let value = T::deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    drop(deserializer);
    match value {
        Err(error) if error.is_io() => Err(error.into()),
        Err(error) => Ok(Err(format!("not a manifest: {error}"))),
        Ok(value) => {
            io::copy(&mut reader, &mut io::sink())?;
            Ok(Ok((value, reader.get_ref().finish().1)))
        }
    }
}
