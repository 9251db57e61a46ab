//! Text that comes from files, as it may reach a terminal: names can hold what would move the cursor, set the window's title
//! or turn the line around.

use std::borrow::Cow;
use std::fmt::Write;

/// A name, or whatever else belongs on one line, with all that isn't seen as it stands spelled out: `\u{1b}`.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_unseen)
}

/// Several lines: the breaks between them stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_unseen(c))
}

fn escaped(text: &str, is_escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    // Nearly all text is; all of it is looked at, which is faster than to stop.
    if text.bytes().fold(true, |is_plain, byte| is_plain & ((b' '..=b'~').contains(&byte) | (byte == b'\n')))
        && (!text.contains('\n') || !is_escaped('\n'))
    {
        return text.into();
    }
    let Some(first) = text.find(&is_escaped) else { return text.into() };
    let mut plain = text[..first].to_owned();
    for c in text[first..].chars() {
        if is_escaped(c) {
            let _ = write!(plain, "{}", c.escape_default());
        } else {
            plain.push(c);
        }
    }
    plain.into()
}

/// Control characters, and those of Unicode that change how others are shown: directions, line separators, tags, and signs
/// without a width but the joiners that some scripts are written with.
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        let obeyed = "a\u{1b}]0;title\u{7}\u{9b}2J\r\n\u{202e}b\u{2066}\u{85}\u{200f}";
        let spelled = r"a\u{1b}]0;title\u{7}\u{9b}2J\r\n\u{202e}b\u{2066}\u{85}\u{200f}";
        assert_eq!(line(obeyed), spelled);
        assert_eq!(lines("one\ntwo\t\u{1b}"), "one\ntwo\\t\\u{1b}");
    }

    #[test]
    fn what_is_seen_stays_as_it_is() {
        for text in ["", "model.layers.0.weight", "größe \\ \"x\"", "层.权重", "क्\u{200d}ष", "🙂"] {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }
}
