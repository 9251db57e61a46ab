//! Names of tensors, matched with ends of names.

/// Whether `name` ends with `pattern`, part by part: what comes before it, and the number in place of its `*`.
pub(crate) fn match_end<'n>(name: &'n str, pattern: &str) -> Option<(&'n str, Option<usize>)> {
    let (mut rest, mut expert) = (name, None);
    for expected in pattern.rsplit('.') {
        let part = rest.rsplit('.').next()?;
        if expected == "*" {
            // One spelling for each number, or two tensors could be the same expert's.
            expert = Some(part.parse().ok().filter(|number: &usize| number.to_string() == part)?);
        } else if part != expected {
            return None;
        }
        rest = rest[..rest.len() - part.len()].trim_end_matches('.');
    }
    Some((rest, expert))
}
