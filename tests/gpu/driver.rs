//! `prequant` on the driver of tests/fake-cuda.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;

use crate::support::{Folder, Run, contents};

/// A folder with the fake driver under the names that the real one is looked for by.
static DRIVER: LazyLock<TempDir> = LazyLock::new(|| {
    let tests = env::current_exe().unwrap();
    let built = tests.parent().unwrap().join("libfake_cuda.so");
    driver_folder(&fs::read(&built).unwrap_or_else(|error| panic!("{}: {error}", built.display())))
});

/// A folder without a driver: what is there can't be loaded, and hides a real one.
pub static NO_DRIVER: LazyLock<TempDir> = LazyLock::new(|| driver_folder(b"not a library"));

fn driver_folder(library: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::write(folder.path().join(name), library).unwrap();
    }
    folder
}

/// `prequant ARGUMENTS` with the fake driver, set up by `settings`.
pub fn prequant(arguments: &[&str], settings: &[(&str, &str)]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    command.args(arguments).env("LD_LIBRARY_PATH", DRIVER.path());
    Run::of(command.envs(settings.iter().copied()))
}

/// `prequant convert SOURCE TO --device cuda FLAGS` with the fake driver.
pub fn convert(folder: &Folder, to: &Path, flags: &[&str], settings: &[(&str, &str)]) -> Run {
    let (source, to) = (folder.source(), to.to_owned());
    let head = ["convert", source.to_str().unwrap(), to.to_str().unwrap(), "--device", "cuda"];
    // The last --device counts, so that tests can name another.
    let flags = if flags.contains(&"--device") { [&head[..3], flags].concat() } else { [&head[..], flags].concat() };
    prequant(&flags, settings)
}

/// What the CPU makes of it.
pub fn on_the_cpu(folder: &Folder, flags: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let to = folder.beside("cpu");
    let _ = fs::remove_dir_all(&to);
    convert(folder, &to, &[&["--device", "cpu"], flags].concat(), &[]).ok();
    contents(&to)
}

/// Lines of the driver's report: a name and a number each.
pub fn report(path: &Path) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line: &str| line.split_once(' ').map(|(name, number)| (name.to_owned(), number.parse().unwrap()));
    text.lines().filter_map(line).collect()
}
