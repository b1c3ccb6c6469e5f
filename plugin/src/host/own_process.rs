//! For tests of what a process has only one of, such as its memory, its limits and its environment: they run once more,
//! alone in a process of their own.

use std::ffi::OsStr;
use std::process::Command;

const ALONE: &str = "VIRTSEAL_TEST_ALONE";

/// Runs `test`, which is the current one, in a process of its own.
pub(crate) fn run(test: impl FnOnce()) {
    if is_this() {
        test();
    } else {
        start([]);
    }
}

/// Whether this process is there for one test only.
pub(crate) fn is_this() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// Runs the current test in a process of its own that finds these texts at these paths, which must be there; needs root.
pub(crate) fn start_with_files(files: &[(&str, &str)]) {
    let directory = tempfile::tempdir().unwrap();
    let test = command();
    let mut isolated = Command::new("unshare");
    isolated.args([
        "--mount",
        "--",
        "sh",
        "-euc",
        r#"while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift; exec "$@""#,
        "sh",
    ]);
    for (nth, (path, text)) in files.iter().enumerate() {
        let file = directory.path().join(nth.to_string());
        std::fs::write(&file, text).unwrap();
        isolated.arg(file).arg(path);
    }
    isolated.arg("--").arg(test.get_program()).args(test.get_args());
    passes(isolated.env(ALONE, "1"));
}

/// What runs the current test in a process of its own.
pub(crate) fn command() -> Command {
    let name = std::thread::current().name().unwrap().to_owned();
    assert_ne!(
        name, "main",
        "a single test thread does not know its test: use two"
    );
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--nocapture", "--test-threads=1"]);
    command.env(ALONE, "1");
    command
}

/// Runs the current test in a process of its own that has these variables too, and waits for it to pass there.
pub(crate) fn start<const N: usize>(variables: [(&str, &OsStr); N]) {
    passes(command().envs(variables));
}

fn passes(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{}\n{said}{complained}",
        output.status
    );
}
