//! PTX as words and signs, each with its line.

/// A word, a quoted text or one sign.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub text: &'a str,
    pub line: u32,
}

const SIGNS: &str = "{}()[]<>,;:|@!+";

fn in_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_.$%-".contains(c)
}

/// Splits a module into tokens; comments are left out.
pub(crate) fn tokens(text: &str) -> Result<Vec<Token<'_>>, String> {
    let mut tokens = Vec::new();
    for (content, line) in text.lines().zip(1..) {
        let mut rest = content.split("//").next().unwrap_or_default().trim_start();
        while let Some(first) = rest.chars().next() {
            let len = match first {
                '"' => rest[1..].find('"').map(|end| end + 2),
                sign if SIGNS.contains(sign) => Some(1),
                c if in_word(c) => Some(rest.find(|c| !in_word(c)).unwrap_or(rest.len())),
                _ => None,
            };
            let len = len.ok_or_else(|| format!("line {line}: no PTX that is known here: {rest}"))?;
            tokens.push(Token { text: &rest[..len], line });
            rest = rest[len..].trim_start();
        }
    }
    Ok(tokens)
}

/// Reads tokens one by one.
pub(crate) struct Cursor<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    /// Where what is being read began; for messages.
    pub began: u32,
}

impl<'a> Cursor<'a> {
    pub fn new(text: &'a str) -> Result<Cursor<'a>, String> {
        Ok(Cursor { tokens: tokens(text)?, at: 0, began: 0 })
    }

    /// The next token's text; empty at the end.
    pub fn peek(&self) -> &'a str {
        self.tokens.get(self.at).map_or("", |token| token.text)
    }

    /// The next token's line.
    pub fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |token| token.line)
    }

    pub fn next(&mut self) -> Result<&'a str, String> {
        let text = self.peek();
        self.at += 1;
        if text.is_empty() { Err("the text ends too early".to_owned()) } else { Ok(text) }
    }

    /// Takes the next token if it is `text`.
    pub fn take(&mut self, text: &str) -> bool {
        let found = self.peek() == text;
        self.at += usize::from(found);
        found
    }

    pub fn expect(&mut self, text: &str) -> Result<(), String> {
        if self.take(text) { Ok(()) } else { Err(format!("`{}` where `{text}` should be", self.peek())) }
    }

    pub fn number<T: std::str::FromStr>(&mut self) -> Result<T, String> {
        let text = self.next()?;
        text.parse().map_err(|_| format!("`{text}` where a number should be"))
    }
}
