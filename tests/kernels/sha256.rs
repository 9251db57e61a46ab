//! SHA-256 of one stream and of two at once, against `sha2` and published vectors.

use prequant::internal::kernel::sha256::{Pairing, Sha256Stream, update_pair, update_two};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

/// Bytes that don't repeat within a block or from one to the next.
fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2654435761) >> 11) as u8).collect()
}

fn expected(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn after(bytes: &[u8]) -> Sha256Stream {
    let mut stream = Sha256Stream::new();
    stream.update(bytes);
    stream
}

fn hex(hash: [u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn nist_examples() {
    let million = vec![b'a'; 1_000_000];
    let long = b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu";
    let examples: [(&[u8], &str); 5] = [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (long, "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"),
        (&million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ];
    for (message, hash) in examples {
        assert_eq!(hex(after(message).finish()), hash);
        for pairing in Pairing::available() {
            let [mut a, mut b] = [Sha256Stream::new(), Sha256Stream::new()];
            pairing.update(&mut a, message, &mut b, message);
            assert_eq!([a, b].map(|stream| hex(stream.finish())), [hash, hash], "{pairing:?}");
        }
    }
}

#[test]
fn every_length_from_every_place_in_a_block() {
    let all = bytes(64 + 300);
    for before in 0..64 {
        for len in 0..300 {
            let (head, tail) = all[..before + len].split_at(before);
            let mut one = after(head);
            one.update(tail);
            let hashes = [expected(&all[..before + len]), expected(tail)];
            assert_eq!(one.finish(), hashes[0], "{before} bytes, then {len}");
            for pairing in Pairing::available() {
                let [mut a, mut b] = [after(head), Sha256Stream::new()];
                pairing.update(&mut a, tail, &mut b, tail);
                assert_eq!([a, b].map(Sha256Stream::finish), hashes, "{before} bytes, then {len}, {pairing:?}");
            }
        }
    }
}

#[test]
fn the_pairing_of_this_processor_is_the_last_of_those_available() {
    assert_eq!(Pairing::available().last(), Some(&Pairing::detect()));
    assert_eq!(Pairing::available()[0], Pairing::InTurn);
    #[cfg(target_arch = "x86_64")]
    assert_eq!(Pairing::detect() == Pairing::Interleaved, is_x86_feature_detected!("sha"));
}

#[test]
fn a_clone_goes_on_by_itself() {
    let all = bytes(500);
    let (head, tail) = all.split_at(131);
    let mut stream = after(head);
    let clone = stream.clone();
    stream.update(tail);
    assert_eq!([stream, clone].map(Sha256Stream::finish), [expected(&all), expected(head)]);
}

#[test]
fn two_streams_by_the_default_pairing() {
    let all = bytes(1000);
    let [mut a, mut b] = [after(&all[..10]), after(&all[..77])];
    update_two(&mut a, &all[10..700], &mut b, &all[77..]);
    update_pair(&mut a, &mut b, &all[..333]);
    let joined = |end: usize| [&all[..end], &all[..333]].concat();
    assert_eq!([a, b].map(Sha256Stream::finish), [expected(&joined(700)), expected(&joined(1000))]);
}

/// Pieces for two streams: lengths on both sides of a block's and of several blocks'.
fn pieces() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let len = || prop_oneof![0..80usize, 0..1000usize, Just(64), Just(128)];
    prop::collection::vec((len(), len()), 0..12)
}

proptest! {
    #[test]
    fn any_pieces_of_two_streams(pieces in pieces()) {
        let (all_a, all_b) = (bytes(12_000), bytes(13_000));
        let all_b = &all_b[1000..];
        for pairing in Pairing::available() {
            let [mut a, mut b] = [Sha256Stream::new(), Sha256Stream::new()];
            let (mut end_a, mut end_b) = (0, 0);
            for (len_a, len_b) in &pieces {
                pairing.update(&mut a, &all_a[end_a..][..*len_a], &mut b, &all_b[end_b..][..*len_b]);
                (end_a, end_b) = (end_a + len_a, end_b + len_b);
            }
            let hashes = [expected(&all_a[..end_a]), expected(&all_b[..end_b])];
            prop_assert_eq!([a, b].map(Sha256Stream::finish), hashes, "{:?}", pairing);
        }
    }

    #[test]
    fn the_same_pieces_for_two_streams(before in 0..130usize, lens in prop::collection::vec(0..400usize, 0..12)) {
        let all = bytes(130 + 12 * 400);
        for pairing in Pairing::available() {
            let [mut a, mut b] = [after(&all[..before]), Sha256Stream::new()];
            let mut end = before;
            for len in &lens {
                let piece = &all[end..][..*len];
                pairing.update(&mut a, piece, &mut b, piece);
                end += len;
            }
            let hashes = [expected(&all[..end]), expected(&all[before..end])];
            prop_assert_eq!([a, b].map(Sha256Stream::finish), hashes, "{:?}", pairing);
        }
    }

    #[test]
    fn any_pieces_of_one_stream(pieces in prop::collection::vec(0..300usize, 0..20)) {
        let all = bytes(6000);
        let (mut stream, mut end) = (Sha256Stream::new(), 0);
        for len in pieces {
            stream.update(&all[end..][..len]);
            end += len;
        }
        prop_assert_eq!(stream.finish(), expected(&all[..end]));
    }
}
