//! Every fault from a kernel of a few lines, and what is no fault beside it.

use ptx_interpreter::{Fault, Memory, Module, Problem};

/// A kernel that is given one buffer, whose address is in `%rd1`; `%r1` is the thread and `%rd2` its word's address.
fn kernel(body: &str) -> String {
    format!(
        ".version 7.8 .target sm_75 .address_size 64
.visible .entry kernel(.param .u64 buffer) .maxntid 64, 1, 1
{{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .f32 %f<4>; .reg .b32 %r<16>; .reg .b64 %rd<16>;
.shared .align 4 .b8 words[128];
ld.param.u64 %rd1, [buffer]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd2, %rd1, %rd3;
mov.u64 %rd4, words; add.s64 %rd5, %rd4, %rd3;
{body}
ret;
}}"
    )
}

/// Runs `threads` threads on a buffer of 128 bytes whose first half is written.
fn run(body: &str, threads: u32) -> Result<Vec<u8>, Fault> {
    let module = Module::parse(&kernel(body)).unwrap();
    let mut memory = Memory::new();
    let buffer = memory.allocate(128);
    memory.fill(buffer, 7, 64)?;
    let kernel = module.entry("kernel").unwrap();
    kernel.launch(&mut memory, [1, 1, 1], [threads, 1, 1], &[buffer.to_le_bytes().to_vec()])?;
    memory.read(buffer, 64)
}

fn problem(body: &str, threads: u32) -> Problem {
    run(body, threads).unwrap_err().problem().clone()
}

#[test]
fn what_is_right_runs() {
    let words = run("st.global.u32 [%rd2], %r1;", 16).unwrap();
    assert_eq!(words, (0..16u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    // Each thread's word by way of its neighbour.
    let exchange = "st.shared.u32 [%rd5], %r1; bar.sync 0; sub.s32 %r2, 15, %r1; mul.wide.u32 %rd6, %r2, 4;
        add.s64 %rd7, %rd4, %rd6; ld.shared.u32 %r3, [%rd7]; st.global.u32 [%rd2], %r3;";
    assert_eq!(run(exchange, 16).unwrap(), (0..16u32).rev().flat_map(u32::to_le_bytes).collect::<Vec<_>>());
}

#[test]
fn a_fault_says_where() {
    let fault = run("ld.global.u32 %r2, [%rd2+128];", 1).unwrap_err().to_string();
    assert!(
        fault.starts_with("kernel, line 8, thread [0, 0, 0] of thread block [0, 0, 0]: global memory out"),
        "{fault}"
    );
}

#[test]
fn out_of_bounds() {
    for body in ["ld.global.u32 %r2, [%rd1+128];", "st.global.u8 [%rd1+-1], %r1;", "ld.global.u32 %r2, [%rd4];"] {
        assert!(matches!(problem(body, 1), Problem::OutOfBounds(_)), "{body}");
    }
    for body in ["st.shared.u32 [%rd4+128], %r1;", "st.shared.u32 [%rd4+-4], %r1;", "ld.shared.u32 %r2, [%rd1];"] {
        assert!(matches!(problem(body, 1), Problem::SharedOutOfBounds(_)), "{body}");
    }
}

#[test]
fn misaligned() {
    for body in ["ld.global.u32 %r2, [%rd1+2];", "ld.global.nc.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+4];"] {
        assert!(matches!(problem(body, 1), Problem::Misaligned(_)), "{body}");
    }
    assert!(matches!(problem("st.shared.u32 [%rd4+1], %r1;", 1), Problem::Misaligned(_)));
}

#[test]
fn uninitialised() {
    assert!(matches!(problem("ld.global.u32 %r2, [%rd1+64];", 1), Problem::Uninitialised(_)));
    assert!(matches!(problem("ld.shared.u32 %r2, [%rd4];", 1), Problem::SharedUninitialised(_)));
    assert_eq!(problem("add.s32 %r2, %r3, 1;", 1), Problem::UninitialisedRegister("%r3".to_owned()));
    // A register that only one side of a branch writes.
    let body = "setp.eq.s32 %p1, %r1, 0; @%p1 mov.u32 %r3, 1; st.global.u32 [%rd2], %r3;";
    assert!(run(body, 1).is_ok());
    assert_eq!(problem(body, 2), Problem::UninitialisedRegister("%r3".to_owned()));
}

#[test]
fn barriers_that_not_all_reach() {
    let exits = "setp.eq.s32 %p1, %r1, 3; @%p1 bra out; bar.sync 0; out:";
    assert_eq!(problem(exits, 16), Problem::BarrierDivergence);
    let elsewhere = "setp.eq.s32 %p1, %r1, 3; @%p1 bra two; bar.sync 0; bra out; two: bar.sync 0; out:";
    assert_eq!(problem(elsewhere, 16), Problem::BarrierDivergence);
    assert_eq!(problem("setp.gt.u32 %p1, %r1, 31; @%p1 bar.sync 0;", 64), Problem::BarrierDivergence);
}

#[test]
fn shuffles() {
    let shuffle = |mask: &str, by: u32| format!("mov.u32 %r2, {mask}; shfl.sync.down.b32 %r3|%p1, %r1, {by}, 31, %r2;");
    let store = "@%p1 add.s32 %r3, %r3, 100; setp.lt.u32 %p2, %r1, 16; @%p2 st.global.u32 [%rd2], %r3;";
    let words = run(&format!("{} {store}", shuffle("-1", 20)), 32).unwrap();
    let expected = (0..16u32).map(|i| if i + 20 < 32 { i + 120 } else { i });
    assert_eq!(words, expected.flat_map(u32::to_le_bytes).collect::<Vec<_>>());

    assert_eq!(problem(&shuffle("-1", 1), 31), Problem::ShuffleMask(u32::MAX));
    assert_eq!(problem(&shuffle("65535", 1), 17), Problem::ShuffleLane(16));
    assert_eq!(problem(&shuffle("-2", 1), 32), Problem::ShuffleMask(u32::MAX - 1));
    assert_eq!(problem(&shuffle("7", 1), 3), Problem::ShuffleLane(3));
    let exits = format!("setp.eq.s32 %p1, %r1, 3; @%p1 bra out; {} out:", shuffle("-1", 1));
    assert_eq!(problem(&exits, 32), Problem::ShuffleMask(u32::MAX));
}

#[test]
fn butterflies() {
    let body = "shfl.sync.bfly.b32 %r3|%p1, %r1, 5, 31, -1; setp.lt.u32 %p2, %r1, 16; @%p2 st.global.u32 [%rd2], %r3;";
    assert_eq!(run(body, 32).unwrap(), (0..16u32).flat_map(|i| (i ^ 5).to_le_bytes()).collect::<Vec<_>>());
}

#[test]
fn races() {
    assert!(matches!(problem("st.global.u32 [%rd1], %r1;", 2), Problem::Race(_)));
    assert!(matches!(problem("ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd2], %r2;", 2), Problem::Race(_)));
    assert!(run("ld.global.u32 %r2, [%rd2]; st.global.u32 [%rd2], %r2;", 2).is_ok());

    assert!(matches!(problem("st.shared.u32 [%rd4], %r1;", 2), Problem::SharedRace(_)));
    let read = "setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.u32 [%rd4], %r1;";
    assert!(matches!(problem(&format!("{read} ld.shared.u32 %r2, [%rd4];"), 2), Problem::SharedRace(_)));
    assert!(run(&format!("{read} bar.sync 0; ld.shared.u32 %r2, [%rd4];"), 2).is_ok());
    let overwritten = "bar.sync 0; ld.shared.u32 %r2, [%rd4]; @!%p1 st.shared.u32 [%rd4], %r1;";
    assert!(matches!(problem(&format!("{read} {overwritten}"), 2), Problem::SharedRace(_)));
}

#[test]
fn stores_to_what_is_read_as_constant() {
    for body in [
        "ld.global.nc.u32 %r2, [%rd2]; st.global.u32 [%rd2], %r2;",
        "st.global.u32 [%rd2], %r1; ld.global.nc.u32 %r2, [%rd2];",
    ] {
        assert!(matches!(problem(body, 1), Problem::ReadOnlyWritten(_)), "{body}");
    }
}

#[test]
fn endless_loops() {
    assert_eq!(problem("again: bra again;", 1), Problem::Budget);
}

#[test]
fn launches_that_no_kernel_takes() {
    assert_eq!(problem("", 65), Problem::Threads(65));
    assert_eq!(problem("", 0), Problem::Threads(0));
    let module = Module::parse(&kernel("")).unwrap();
    let launch = |params: &[Vec<u8>]| {
        let launched = module.entry("kernel").unwrap().launch(&mut Memory::new(), [1; 3], [1; 3], params);
        launched.map_err(|fault| fault.problem().clone())
    };
    assert_eq!(launch(&[]), Err(Problem::Params));
    assert_eq!(launch(&[vec![0; 4]]), Err(Problem::Params));
}

#[test]
fn host_accesses() {
    let mut memory = Memory::new();
    let (a, b) = (memory.allocate(10), memory.allocate(10));
    assert!(a % 256 == 0 && b % 256 == 0 && a != 0 && a.abs_diff(b) > 256);
    memory.write(a, &[1, 2]).unwrap();
    assert_eq!(memory.read(a, 2).unwrap(), [1, 2]);
    assert_eq!(memory.read(a, 3), Err(Fault::Host(Problem::Uninitialised(a + 2))));
    assert_eq!(memory.write(a + 9, &[0; 2]), Err(Fault::Host(Problem::OutOfBounds(a + 9))));
    assert!(memory.free(a + 1).is_err());
    memory.free(a).unwrap();
    assert!(memory.free(a).is_err() && memory.read(a, 1).is_err());
}

#[test]
fn what_is_unknown_is_refused_with_its_line() {
    for (body, what) in [
        ("frobnicate.u32 %r2, %r1;", "line 8: `frobnicate.u32`"),
        ("add.rn.ftz.f32 %f1, %f1, %f1;", "line 8: `add.rn.ftz.f32`"),
        ("rcp.approx.f32 %f1, %f1;", "line 8: `rcp.approx.f32`"),
        ("ld.global.cg.u32 %r2, [%rd1];", "line 8: `ld.global.cg.u32`"),
        ("add.s32 %r2, %f1, 1;", "`%f1` is of another type"),
        ("add.s32 %r2, %r99, 1;", "unknown name `%r99`"),
        ("add.s32 %r2, %r1, 4294967296;", "is no number of that type"),
        ("bar.sync 1;", "`bar.sync`"),
        (".maxnreg 3;", "line 8: `.maxnreg`"),
        ("bra nowhere;", "line 8: no label `nowhere`"),
        ("#", "line 8"),
    ] {
        let message = Module::parse(&kernel(body)).unwrap_err();
        assert!(message.contains(what), "{body}: {message}");
    }
}
