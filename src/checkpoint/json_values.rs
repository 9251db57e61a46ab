//! How many values a JSON text has, told without holding them: what is made of a text can take fifty times its length.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// More values than this no config has: lists of all modules of the largest models have a fifth.
const MOST: usize = 1 << 19;

/// Bytes that a value takes at most once it is held: objects and lists of a single value take the most.
const EACH: u64 = 256;

/// Counts the values of a text.
///
/// # Errors
/// When it isn't JSON, or has more than [`MOST`].
pub(super) fn count(text: &[u8]) -> serde_json::Result<usize> {
    let mut count = 0;
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    Counter(&mut count).deserialize(&mut deserializer)?;
    deserializer.end().map(|()| count)
}

/// What a text says.
///
/// # Errors
/// As [`count`]'s.
pub(crate) fn parse(text: &[u8]) -> serde_json::Result<Value> {
    count(text)?;
    serde_json::from_slice(text)
}

/// Bytes that so many values take, by estimate.
pub(super) fn held_len(values: usize) -> u64 {
    EACH * values as u64
}

struct Counter<'c>(&'c mut usize);

impl Counter<'_> {
    fn add<E: Error>(&mut self) -> Result<(), E> {
        *self.0 += 1;
        if *self.0 > MOST { Err(E::custom(format_args!("it has more than {MOST} values"))) } else { Ok(()) }
    }
}

impl<'de> DeserializeSeed<'de> for Counter<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(mut self, deserializer: D) -> Result<(), D::Error> {
        self.add()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counter<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        while values.next_element_seed(Counter(&mut *self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while entries.next_key_seed(Counter(&mut *self.0))?.is_some() {
            entries.next_value_seed(Counter(&mut *self.0))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_counted_wherever_they_are() {
        for (text, values) in
            [("1", 1), ("[]", 1), ("[1, [2.5, null], \"a\"]", 6), (r#"{"a": {"b": true}, "c": -1}"#, 7)]
        {
            assert_eq!(count(text.as_bytes()).unwrap(), values, "{text}");
        }
        for text in ["", "[1", "{} x", "tru"] {
            assert!(count(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn what_would_fill_memory_is_refused_before_it_does() {
        let list = |values: usize| format!("[{}]", vec!["0"; values].join(","));
        assert_eq!(count(list(MOST - 1).as_bytes()).unwrap(), MOST);
        let error = parse(list(MOST).as_bytes()).unwrap_err().to_string();
        assert!(error.contains("more than 524288 values"), "{error}");
    }
}
