//! Whether a file is signed by a key that root trusts, as `gpgv` finds it: no trust database, no keys but those in the keyring.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::model::deadlines::signature::{LOOK, VERIFIED_BY};
use crate::model::problem::{Code, Problem};
use crate::terminal::quoted;

const INLINE: &[u8] = b"-----BEGIN PGP SIGNED MESSAGE-----";
/// What a signature of the file FILE is called beside it.
const BESIDE: [&str; 4] = ["sign", "gpg", "asc", "sig"];

/// What is signed in `bytes`, the content of the file `path`: all of it where the signature is beside it, else what is inside
/// the one that it has.
pub(super) fn signed_text(bytes: &[u8], path: &Path, keyring: &Path) -> Result<Vec<u8>, Problem> {
    let failed = |error: &io::Error| {
        Problem::from_error(
            Code::Failed,
            format!("can't check the signature of {}", path.display()),
            error,
        )
    };
    let keyring = std::path::absolute(keyring).map_err(|error| failed(&error))?;
    refuse_armor(&keyring)?;
    let inline = bytes.starts_with(INLINE);
    let beside = match inline {
        true => None,
        false => Some(signature_beside(path)?),
    };
    let said = gpgv(bytes, beside.as_deref(), &keyring).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Problem::failed("can't check a signature: there is no gpgv here")
            .next("apt install gpgv, or dnf install gnupg2"),
        io::ErrorKind::TimedOut => Problem::failed(format!(
            "gpgv did not finish checking the signature of {}",
            path.display()
        )),
        _ => failed(&error),
    })?;
    if !said.is_good(inline) {
        return Err(Problem::new(
            Code::NotTrusted,
            format!(
                "the signature of {} is not one by a key in {}: {}",
                path.display(),
                keyring.display(),
                said.words()
            ),
        )
        .next("get the file and its signature again from who made the image, and that one's keys from your distribution"));
    }
    Ok(match inline {
        true => said.text,
        false => bytes.to_owned(),
    })
}

fn signature_beside(path: &Path) -> Result<PathBuf, Problem> {
    let named = |extension: &str| -> PathBuf {
        let mut name = OsString::from(path);
        name.push(format!(".{extension}"));
        name.into()
    };
    let found = BESIDE.map(named).into_iter().find(|signature| signature.exists());
    let failed = || {
        let names = BESIDE.map(|extension| format!(".{extension}")).join(", ");
        Problem::not_found(format!(
            "{} has no signature inside, and none beside it ({names})",
            path.display()
        ))
        .next("download that too, or leave --keyring out where you trust the file without it")
    };
    let found = found.ok_or_else(failed)?;
    std::path::absolute(found).map_err(|error| Problem::from_error(Code::Failed, "can't find it", &error))
}

/// `gpgv` reads no armor of keyrings, and says only that there is no key.
fn refuse_armor(keyring: &Path) -> Result<(), Problem> {
    let failed =
        |error: io::Error| Problem::from_io(format!("can't read the keyring {}", keyring.display()), &error);
    let mut start = Vec::new();
    let file = File::open(keyring).map_err(failed)?;
    file.take(64).read_to_end(&mut start).map_err(failed)?;
    match start.starts_with(b"-----BEGIN PGP") {
        true => Err(Problem::usage(format!(
            "{} is text, and gpgv reads keyrings in binary form alone",
            keyring.display()
        ))
        .next(format!(
            "gpg --dearmor -o keyring.gpg {}, then --keyring keyring.gpg",
            quoted(keyring.display())
        ))),
        false => Ok(()),
    }
}

struct Said {
    status: ExitStatus,
    /// What was signed, if the signature is around it.
    text: Vec<u8>,
    /// For programs (`[GNUPG:] …`) and for people.
    lines: String,
}

impl Said {
    fn tells(&self, keyword: &str) -> bool {
        let start = format!("[GNUPG:] {keyword} ");
        self.lines.lines().any(|line| line.starts_with(&start))
    }

    /// A file beside `FILE` that has a signed text of its own says nothing of `FILE`.
    fn is_good(&self, inline: bool) -> bool {
        self.status.success()
            && self.tells("GOODSIG")
            && self.tells("VALIDSIG")
            && self.tells("PLAINTEXT") == inline
    }

    fn words(&self) -> String {
        let lines = self.lines.lines().filter_map(|line| line.strip_prefix("gpgv: "));
        lines.map(str::trim).collect::<Vec<_>>().join("; ")
    }
}

/// Nothing has to be read while it runs: all goes to memory.
fn gpgv(bytes: &[u8], signature: Option<&Path>, keyring: &Path) -> io::Result<Said> {
    let memory = || memfd_create("gpgv", MFdFlags::MFD_CLOEXEC).map(File::from);
    let (mut input, mut text, mut lines) = (memory()?, memory()?, memory()?);
    input.write_all(bytes)?;
    input.rewind()?;
    let mut command = Command::new("gpgv");
    command
        .args(["--status-fd", "2", "--weak-digest", "SHA1", "--keyring"])
        .arg(keyring);
    match signature {
        Some(signature) => command.arg(signature).arg("-"),
        None => command.args(["--output", "-", "-"]),
    };
    let child = command
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir("/")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(text.try_clone()?))
        .stderr(Stdio::from(lines.try_clone()?))
        .spawn()?;
    let status = wait(child)?;
    let all = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .map(|_| bytes)
    };
    Ok(Said {
        status,
        text: all(&mut text)?,
        lines: String::from_utf8_lossy(&all(&mut lines)?).into_owned(),
    })
}

fn wait(mut child: Child) -> io::Result<ExitStatus> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if began.elapsed() > VERIFIED_BY {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Two keys, and a file that the first one has signed.
    struct Desk(tempfile::TempDir);

    impl Desk {
        fn new() -> Self {
            let desk = Self(tempfile::tempdir().unwrap());
            fs::write(desk.path("SUMS"), "sum  cloud.img\n").unwrap();
            for key in ["maker", "other"] {
                desk.gpg(&[
                    "--passphrase",
                    "",
                    "--quick-gen-key",
                    key,
                    "ed25519",
                    "sign",
                    "never",
                ]);
                desk.gpg(&["-o", &format!("{key}.gpg"), "--export", key]);
            }
            desk
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn gpg(&self, arguments: &[&str]) {
            let output = Command::new("gpg")
                .args(["--batch", "--yes", "--quiet", "--homedir", "."])
                .args(arguments)
                .current_dir(self.0.path())
                .output()
                .expect("gpg, of the package gnupg");
            assert!(output.status.success(), "{output:?}");
        }

        fn signed(&self, sums: &str, keyring: &str) -> Result<Vec<u8>, Problem> {
            let path = self.path(sums);
            signed_text(&fs::read(&path).unwrap(), &path, &self.path(keyring))
        }
    }

    impl Drop for Desk {
        fn drop(&mut self) {
            let _ = Command::new("gpgconf")
                .args(["--homedir", ".", "--kill", "all"])
                .current_dir(self.0.path())
                .status();
        }
    }

    #[test]
    fn what_a_key_of_the_keyring_has_signed_is_taken_and_nothing_around_it() {
        let desk = Desk::new();
        let sums = fs::read(desk.path("SUMS")).unwrap();
        for (armor, signature) in [("--armor", "SUMS.sign"), ("--no-armor", "SUMS.gpg")] {
            desk.gpg(&["-u", "maker", armor, "-o", signature, "--detach-sign", "SUMS"]);
            assert_eq!(desk.signed("SUMS", "maker.gpg").as_ref(), Ok(&sums));
            let refused = desk.signed("SUMS", "other.gpg").unwrap_err();
            assert_eq!(refused.code, Code::NotTrusted, "{refused}");
            fs::remove_file(desk.path(signature)).unwrap();
        }
        desk.gpg(&["-u", "maker", "-o", "INLINE", "--clearsign", "SUMS"]);
        assert_eq!(desk.signed("INLINE", "maker.gpg").as_ref(), Ok(&sums));
        let mut longer = fs::read(desk.path("INLINE")).unwrap();
        longer.extend(b"\nother  cloud.img\n");
        fs::write(desk.path("INLINE"), longer).unwrap();
        assert_eq!(desk.signed("INLINE", "maker.gpg").ok(), Some(sums));
    }

    #[test]
    fn what_was_changed_or_has_no_signature_is_refused() {
        let desk = Desk::new();
        let refused = desk.signed("SUMS", "maker.gpg").unwrap_err();
        assert_eq!(refused.code, Code::NotFound, "{refused}");

        desk.gpg(&["-u", "maker", "-o", "SUMS.sign", "--detach-sign", "SUMS"]);
        desk.gpg(&["-u", "maker", "-o", "INLINE", "--clearsign", "SUMS"]);
        for name in ["SUMS", "INLINE"] {
            let changed = fs::read_to_string(desk.path(name))
                .unwrap()
                .replace("sum ", "son ");
            fs::write(desk.path(name), changed).unwrap();
            let refused = desk.signed(name, "maker.gpg").unwrap_err();
            assert_eq!(refused.code, Code::NotTrusted, "{refused}");
            assert!(refused.message.contains("BAD signature"), "{refused}");
        }
        // A signature of another text, which is inside of it.
        desk.gpg(&["-u", "maker", "-o", "SUMS.sign", "--sign", "maker.gpg"]);
        assert!(desk.signed("SUMS", "maker.gpg").is_err());

        desk.gpg(&["--armor", "-o", "armored", "--export", "maker"]);
        let refused = desk.signed("SUMS", "armored").unwrap_err().to_string();
        assert!(refused.contains("gpg --dearmor"), "{refused}");
    }
}
