//! A process that dies while it makes an image.

use crate::object::nvram;

use super::filling::cloud_image;
use super::*;

const STEPS: [Step; 7] = [
    Step::Staged,
    Step::Written,
    Step::Filled,
    Step::Synced,
    Step::Verified,
    Step::Published,
    Step::Durable,
];

/// Set for the process that the test below starts, to be killed: job, number of the step, directory.
const ORDER: &str = "VIRTSEAL_TEST_CRASH";
const KILLED: &str = "object::tests::killed::killed_at_any_step_leaves_nothing_or_an_image_that_opens";

#[test]
fn killed_at_any_step_leaves_nothing_or_an_image_that_opens() {
    if let Ok(order) = std::env::var(ORDER) {
        carry_out(&order);
    }
    for job in ["new", "from", "replace", "nvram"] {
        for (number, step) in STEPS.iter().enumerate() {
            if job == "nvram" && *step == Step::Filled {
                continue;
            }
            let bench = Bench::new();
            fs::write(bench.path("envelope"), bench.envelope.to_json()).unwrap();
            fs::write(bench.path("source"), vec![0x77; 1 << 20]).unwrap();
            if job == "replace" {
                let empty = fs::File::create(bench.path("target")).unwrap();
                empty.set_len(64 << 20).unwrap();
            }
            let directory = bench.directory.path().display();
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", KILLED])
                .env(ORDER, format!("{job} {number} {directory}"))
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(9), "{job} {step:?}");
            examine(&bench, job, *step);
        }
    }
}

/// The part of the process that is killed.
fn carry_out(order: &str) -> ! {
    let (job, rest) = order.split_once(' ').unwrap();
    let (step, directory) = rest.split_once(' ').unwrap();
    let step = STEPS[step.parse::<usize>().unwrap()];
    let directory = Path::new(directory);
    let key = hex::decode(fs::read(directory.join("key")).unwrap()).unwrap();
    let passphrase = Dek::from_bytes(&key).unwrap().passphrase().unwrap();
    let envelope = Envelope::from_json(&fs::read_to_string(directory.join("envelope")).unwrap()).unwrap();
    let die_there = |done: Step| {
        if done == step {
            let me = nix::unistd::getpid();
            nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    };
    let (source, target) = (directory.join("source"), directory.join("target"));
    let request = CreateRequest::new(&target, Bytes(64 << 20));
    let failed = match job {
        "nvram" => nvram::create_watched(&place(&source), &place(&target), None, &passphrase, die_there)
            .and_then(|prepared| prepared.publish_watched(die_there))
            .err(),
        "converting" => disk::create_from(&request, &source, &envelope, &passphrase, die_converting).err(),
        "from" => {
            disk::create_from_watched(&request, &source, &envelope, &passphrase, go_on, die_there).err()
        }
        "replace" => {
            let held = ImageLock::open(&place(&target)).unwrap();
            disk::prepare_over_watched(held, &request, &envelope, &passphrase, die_there)
                .and_then(|prepared| prepared.publish_watched(die_there))
                .err()
        }
        _ => disk::create_watched(&request, &envelope, &passphrase, die_there).err(),
    };
    panic!("still alive: {failed:?}");
}

/// Stops the child for good, so that only its parent's death can end it, and dies.
fn die_converting(_: disk::Heard) -> ControlFlow<()> {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    for thread in fs::read_dir("/proc/self/task").unwrap() {
        let children = fs::read_to_string(thread.unwrap().path().join("children")).unwrap();
        for child in children.split_whitespace() {
            kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGSTOP).unwrap();
            fs::write("child", child).unwrap();
        }
    }
    kill(Pid::this(), Signal::SIGKILL).unwrap();
    ControlFlow::Break(())
}

#[test]
fn killed_while_converting_leaves_neither_a_file_nor_a_process() {
    let bench = Bench::new();
    fs::write(bench.path("envelope"), bench.envelope.to_json()).unwrap();
    cloud_image(&bench, "source", "raw");
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", KILLED])
        .env(
            ORDER,
            format!("converting 0 {}", bench.directory.path().display()),
        )
        .current_dir(bench.directory.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9));
    let child = fs::read_to_string(bench.path("child")).unwrap();
    // A zombie that nobody has reaped yet has no executable any more.
    let gone = || fs::read_link(format!("/proc/{child}/exe")).is_err();
    for _ in 0..100 {
        if gone() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(gone(), "qemu-img {child} is still there");
    assert!(!bench.path("target").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}

fn examine(bench: &Bench, job: &str, step: Step) {
    let published = step >= Step::Published;
    if published {
        bench.verify("target").unwrap();
    } else if job == "replace" {
        assert_eq!(bench.inspect("target").data, Data::Empty);
        assert_eq!(bench.inspect("target").format, Format::Raw);
    } else {
        assert!(!bench.path("target").exists(), "{job} {step:?}");
    }
    disk::sweep_temporaries(&bench.place("target")).unwrap();
    assert_eq!(bench.leftovers(), [""; 0], "{job} {step:?}");
    if !published && job != "replace" {
        bench.create(&bench.request("target", 64 << 20)).unwrap();
    }
}
