//! The fuzzers' corpus, as it is and damaged: nothing that reads what strangers wrote panics.

use std::fs;
use std::path::Path;

use super::targets;

/// Damaged copies of each file of the corpus. `PREQUANT_FUZZ_ROUNDS` makes it a longer run.
const ROUNDS: u64 = 300;

/// A generator of numbers that are the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n.max(1)
    }
}

/// What parsers stumble over.
const PIECES: [&[u8]; 12] = [
    b"{",
    b"}",
    b"[",
    b"\"",
    b"\\",
    b"\0",
    b"-1",
    b"18446744073709551615",
    b"1e308",
    b"null",
    b"\xff\xfe",
    b"{\"a\":{\"a\":",
];

fn damage(content: &[u8], random: &mut Random) -> Vec<u8> {
    let mut damaged = content.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(damaged.len() + 1);
        match random.below(5) {
            0 if at < damaged.len() => damaged[at] ^= 1 << random.below(8),
            1 => damaged.truncate(at),
            2 => drop(damaged.splice(at..at, PIECES[random.below(PIECES.len())].iter().copied())),
            3 => {
                let end = damaged.len().min(at + random.below(20));
                damaged.drain(at..end);
            }
            _ => {
                let end = damaged.len().min(at + random.below(40));
                let copy = damaged[at..end].to_vec();
                let to = random.below(damaged.len() + 1);
                damaged.splice(to..to, copy);
            }
        }
    }
    damaged
}

#[test]
fn nothing_panics_on_the_corpus_or_on_damaged_copies_of_it() {
    let rounds = std::env::var("PREQUANT_FUZZ_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/corpus");
    for (name, target) in targets::TARGETS {
        let mut files: Vec<_> = fs::read_dir(corpus.join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(files.len() > 2, "{name}: {} files", files.len());
        for (i, file) in files.iter().enumerate() {
            let content = fs::read(file).unwrap();
            target(&content);
            let mut random = Random(i as u64);
            for _ in 0..rounds {
                target(&damage(&content, &mut random));
            }
        }
    }
}
