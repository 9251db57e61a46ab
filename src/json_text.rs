//! JSON that is taken value by value, each parsed from memory: of any length, in little more memory than its longest value takes.

use std::io::{self, Read};
use std::ops::Range;

use serde::de::DeserializeOwned;

/// Bytes that are read at once.
const BUFFER: usize = 1 << 16;

/// Bytes that a value may have: none comes near, and what isn't JSON must not take all memory.
const LONGEST: usize = 1 << 28;

/// Text of which a part is in memory.
pub(crate) struct JsonText<R> {
    reader: R,
    held: Vec<u8>,
    /// The first byte of `held` that isn't taken.
    start: usize,
    /// Where `held` begins in the file.
    position: u64,
    /// Whole lines before `held`, and where in the file the last one ends.
    lines: usize,
    line_start: u64,
    is_at_end: bool,
}

/// Why a value can't be taken.
#[derive(Debug)]
pub(crate) enum Failure {
    Io(io::Error),
    /// What is wrong with the text, and where.
    Json(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Io(error)
    }
}

/// Takes a value, or more of a text.
type Take<'f, R> = &'f mut dyn FnMut(&mut JsonText<R>) -> Result<(), Failure>;

/// Takes a field's value, by its name.
type TakeField<'f, R> = &'f mut dyn FnMut(String, &mut JsonText<R>) -> Result<(), Failure>;

impl<R: Read> JsonText<R> {
    /// What `reader` gives, which begins at `position` of its file.
    pub(crate) fn new(reader: R, position: u64) -> JsonText<R> {
        let held = Vec::with_capacity(BUFFER);
        JsonText { reader, held, start: 0, position, lines: 0, line_start: position, is_at_end: false }
    }

    /// The reader, once it has given all.
    pub(crate) fn into_reader(self) -> R {
        self.reader
    }

    /// Whether the reader has given all.
    pub(crate) fn is_at_end(&self) -> bool {
        self.is_at_end
    }

    /// Takes a value.
    pub(crate) fn value<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        self.placed().map(|(value, _)| value)
    }

    /// Takes a value, and tells where in the file it stands.
    pub(crate) fn placed<T: DeserializeOwned>(&mut self) -> Result<(T, Range<u64>), Failure> {
        self.peek()?;
        loop {
            let left = &self.held[self.start..];
            let mut values = serde_json::Deserializer::from_slice(left).into_iter::<T>();
            match values.next() {
                // A number that ends where the memory does may go on.
                Some(Ok(value)) if self.is_at_end || values.byte_offset() < left.len() => {
                    let begin = self.at();
                    self.start += values.byte_offset();
                    return Ok((value, begin..self.at()));
                }
                Some(Err(error)) if self.is_at_end || !error.is_eof() => return Err(self.refused(&error)),
                None if self.is_at_end => return Err(self.unexpected("EOF while parsing a value")),
                _ => {
                    if left.len() > LONGEST {
                        return Err(self.defect(&format!("a value of more than {LONGEST} bytes")));
                    }
                    self.fill()?;
                }
            }
        }
    }

    /// Takes an object: `each` takes the values, whose names it is told. `what` is what it is, for who finds something else.
    pub(crate) fn object(&mut self, what: &str, each: TakeField<'_, R>) -> Result<(), Failure> {
        if !self.take(b'{')? {
            return Err(self.unexpected(&format!("expected {what}")));
        }
        self.entries(Some(b'}'), &mut |text| {
            let name = text.value()?;
            match text.take(b':')? {
                true => each(name, text),
                false => Err(text.unexpected("expected `:`")),
            }
        })
    }

    /// Takes a list, of which `each` takes one.
    pub(crate) fn list(&mut self, what: &str, each: Take<'_, R>) -> Result<(), Failure> {
        match self.take(b'[')? {
            true => self.entries(Some(b']'), each),
            false => Err(self.unexpected(&format!("expected {what}"))),
        }
    }

    /// Takes what is there up to the end: parts of a list, of which `each` takes one.
    pub(crate) fn rest_of_list(&mut self, each: Take<'_, R>) -> Result<(), Failure> {
        self.entries(None, each)
    }

    /// There must be nothing more.
    pub(crate) fn end(&mut self) -> Result<(), Failure> {
        match self.peek()? {
            None => Ok(()),
            Some(_) => Err(self.unexpected("trailing characters")),
        }
    }

    /// That something is wrong with what was taken.
    pub(crate) fn defect(&self, what: &str) -> Failure {
        self.defect_at(what, self.start)
    }

    /// That the next byte isn't what it should be.
    fn unexpected(&self, what: &str) -> Failure {
        match self.held.get(self.start) {
            Some(_) => self.defect_at(what, self.start + 1),
            None if what.starts_with("EOF") => self.defect(what),
            None => self.defect(&format!("EOF while parsing: {what}")),
        }
    }

    /// Takes a byte, if it is the next that isn't a space.
    fn take(&mut self, byte: u8) -> Result<bool, Failure> {
        let is_next = self.peek()? == Some(byte);
        self.start += usize::from(is_next);
        Ok(is_next)
    }

    /// Takes what is between commas up to `close`, or to the text's end if that is none.
    fn entries(&mut self, close: Option<u8>, each: Take<'_, R>) -> Result<(), Failure> {
        let is_closed = |text: &mut JsonText<R>| match close {
            Some(byte) => text.take(byte),
            None => text.peek().map(|next| next.is_none()),
        };
        if is_closed(self)? {
            return Ok(());
        }
        loop {
            each(self)?;
            if is_closed(self)? {
                return Ok(());
            }
            if !self.take(b',')? {
                let close = close.map_or(String::new(), |byte| format!(" or `{}`", byte as char));
                return Err(self.unexpected(&format!("expected `,`{close}")));
            }
        }
    }

    /// The next byte that isn't a space; none at the end.
    fn peek(&mut self) -> Result<Option<u8>, Failure> {
        loop {
            let left = &self.held[self.start..];
            match left.iter().position(|byte| !matches!(byte, b' ' | b'\n' | b'\t' | b'\r')) {
                Some(spaces) => {
                    self.start += spaces;
                    return Ok(Some(self.held[self.start]));
                }
                None => self.start = self.held.len(),
            }
            if self.is_at_end {
                return Ok(None);
            }
            self.fill()?;
        }
    }

    /// Holds more of the text, up to twice as much.
    fn fill(&mut self) -> io::Result<()> {
        let taken = &self.held[..self.start];
        let lines = taken.iter().filter(|byte| **byte == b'\n').count();
        if lines > 0 {
            self.lines += lines;
            self.line_start = self.position + line_start(taken) as u64;
        }
        self.position += self.start as u64;
        self.held.drain(..self.start);
        self.start = 0;
        let len = self.held.len();
        self.held.resize(len + len.max(BUFFER), 0);
        let read = loop {
            match self.reader.read(&mut self.held[len..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.held.truncate(len + *read.as_ref().unwrap_or(&0));
        self.is_at_end = self.held.len() == len;
        read.map(|_| ())
    }

    /// The first byte of the file that isn't taken.
    fn at(&self) -> u64 {
        self.position + self.start as u64
    }

    /// What the parser says of the next value.
    fn refused(&self, error: &serde_json::Error) -> Failure {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let what = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
        let left = &self.held[self.start..];
        let lines = left.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1));
        self.defect_at(what, self.start + lines.map(<[u8]>::len).sum::<usize>() + column)
    }

    /// With line and column, as the parser counts them, where so many of the bytes that are held are needed to see it.
    fn defect_at(&self, what: &str, end: usize) -> Failure {
        let before = &self.held[..end.min(self.held.len())];
        let lines = before.iter().filter(|byte| **byte == b'\n').count();
        let line_start = if lines > 0 { self.position + line_start(before) as u64 } else { self.line_start };
        let (line, column) = (1 + self.lines + lines, self.position + before.len() as u64 - line_start);
        Failure::Json(format!("{what} at line {line} column {column}"))
    }
}

/// Where the last line begins.
fn line_start(text: &[u8]) -> usize {
    text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// Gives so many bytes at once.
    struct Slowly<'a>(&'a [u8], usize);

    impl Read for Slowly<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let len = self.1.min(self.0.len()).min(into.len());
            into[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    /// The values of a list, or what is wrong with it.
    fn values(text: &str, step: usize) -> Result<Vec<(Value, Range<u64>)>, String> {
        let (mut found, mut reading) = (Vec::new(), JsonText::new(Slowly(text.as_bytes(), step), 0));
        let mut each = |text: &mut JsonText<_>| text.placed().map(|value| found.push(value));
        let taken = reading.list("a list", &mut each).and_then(|()| reading.end());
        match taken {
            Ok(()) => Ok(found),
            Err(Failure::Json(why)) => Err(why),
            Err(Failure::Io(error)) => panic!("{error}"),
        }
    }

    #[test]
    fn values_are_the_same_wherever_reading_pauses() {
        let text = " [ 12, -3.5e2,true , null,\"a\\\"]\\u00e9é\",{\"b\": [1,\n[2]], \"c\":\"}\"},[] ] \n";
        let all: Vec<Value> = serde_json::from_str(text).unwrap();
        for step in 1..text.len() + 1 {
            let found = values(text, step).unwrap();
            assert_eq!(found.iter().map(|(value, _)| value.clone()).collect::<Vec<_>>(), all);
            for (value, Range { start, end }) in found {
                let of_place: Value = serde_json::from_str(&text[start as usize..end as usize]).unwrap();
                assert_eq!(of_place, value);
                assert!(!text[start as usize..].starts_with(' ') && !text[..end as usize].ends_with(' '));
            }
        }
    }

    #[test]
    fn defects_are_where_the_parser_of_the_whole_finds_them() {
        for text in
            ["[1,\n 2, tru]", "[1,\n\n{\"a\" 1}]", "[\n1\n2]", "[1,\n{\"a\":1]", "[1] x", "[1,\n\"a\n\"]", "[1,]"]
        {
            let whole = serde_json::from_str::<Value>(text).unwrap_err();
            let place = format!(" at line {} column {}", whole.line(), whole.column());
            for step in [1, 2, 100] {
                let found = values(text, step).unwrap_err();
                assert!(found.ends_with(&place), "{text}: {found}, expected {whole}");
            }
        }
        for text in ["", "[", "[1", "[1,", "[{\"a\":", "[\"a"] {
            assert!(values(text, 1).unwrap_err().starts_with("EOF"), "{text}");
        }
    }
}
