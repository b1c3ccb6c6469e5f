//! The sum that a distribution has published for an image: a file as `sha256sum`, `sha512sum` or their BSD sisters write it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::signature;
use crate::model::digest::Digest;
use crate::model::problem::Problem;

/// Debian's have some kilobytes.
const MAX_BYTES: u64 = 4 << 20;

/// The sum of `image` in the file `sums`, whose signature is checked if there is a `keyring`.
pub(super) fn of_image(sums: &Path, keyring: Option<&Path>, image: &Path) -> Result<Digest, Problem> {
    let bytes = read(sums)?;
    let bytes = match keyring {
        Some(keyring) => signature::signed_text(&bytes, sums, keyring)?,
        None => bytes,
    };
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let text = String::from_utf8_lossy(&bytes);
    pick(&text, &name).map_err(|why| {
        Problem::failed(format!("{}: {why}", sums.display())).next(format!(
            "give the image the name that it has there, or give its sum: --sha256 HEX, from who made {name}"
        ))
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| Problem::from_io(format!("can't read {}", path.display()), &error))?;
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(Problem::usage(format!(
            "{} is too large for a file of sums",
            path.display()
        ))),
        false => Ok(bytes),
    }
}

/// The strongest sum that `text` has for the file `name`.
fn pick(text: &str, name: &str) -> Result<Digest, String> {
    // Alpine's files have a sum and nothing else.
    if let Some(only) = Digest::from_hex(text.trim()) {
        return Ok(only);
    }
    let mut found: Option<Digest> = None;
    for digest in text
        .lines()
        .filter_map(line)
        .filter(|(of, _)| *of == name)
        .map(|(_, sum)| sum)
    {
        match &found {
            Some(before) if before.algorithm() == digest.algorithm() && *before != digest => {
                return Err(format!("it has two sums for {name}, {before} and {digest}"));
            }
            Some(before) if before.algorithm() >= digest.algorithm() => {}
            _ => found = Some(digest),
        }
    }
    found.ok_or_else(|| format!("it has no SHA-256 or SHA-512 of {name}"))
}

/// `HEX  NAME`, `HEX *NAME` or `SHA256 (NAME) = HEX`; the name without a directory.
fn line(line: &str) -> Option<(&str, Digest)> {
    let line = line.trim_end_matches('\r');
    let (name, hex) = match line.split_once(" (").filter(|(kind, _)| kind.starts_with("SHA")) {
        Some((kind, rest)) => {
            let (name, hex) = rest.rsplit_once(") = ")?;
            let digest = format!("{}:{hex}", kind.to_lowercase()).parse().ok()?;
            return Some((base(name), digest));
        }
        None => {
            let (hex, name) = line.split_once(' ')?;
            (name.strip_prefix([' ', '*']).unwrap_or(name), hex)
        }
    };
    Some((base(name), Digest::from_hex(hex)?))
}

fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Targets: what a server sent.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz {
    use crate::fuzz_target::Target;

    pub(crate) const SUMS: Target = Target {
        name: "sums_file",
        seeds: || {
            let sum = "0f".repeat(32);
            [
                format!("{sum}  cloud.img\n"),
                format!("{sum}{sum} *images/cloud.img\n"),
                format!("SHA256 (cloud.img) = {sum}\n"),
                sum,
            ]
            .map(String::into_bytes)
            .into()
        },
        read: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let Ok(digest) = super::pick(&text, "cloud.img") else {
                return false;
            };
            let hex = digest.to_string();
            let hex = hex.split_once(':').expect("it names its kind").1;
            assert!(text.to_lowercase().contains(hex), "a sum that is not in the file");
            true
        },
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_found_as_distributions_write_them() {
        let (one, two, other) = ("1f".repeat(32), "2F".repeat(64), "3f".repeat(32));
        let ubuntu = format!("{other} *other.img\n{one} *noble-server-cloudimg-amd64.img\n");
        let debian = format!("{two}  debian-13-generic-amd64.qcow2\r\n{two}  debian-13-generic-amd64.raw\n");
        let fedora = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# Fedora-Cloud-Base.qcow2: 400 bytes\n\
             SHA256 (Fedora-Cloud-Base.qcow2) = {one}\n-----BEGIN PGP SIGNATURE-----\n"
        );
        let below = format!(
            "{one}  ./images/cloud.img\n{two}  cloud.img\n{}  cloud.img\n",
            "4f".repeat(20)
        );
        for (text, name, hex) in [
            (&ubuntu, "noble-server-cloudimg-amd64.img", &one),
            (&debian, "debian-13-generic-amd64.qcow2", &two),
            (&fedora, "Fedora-Cloud-Base.qcow2", &one),
            (&below, "cloud.img", &two),
            (&format!("{one}\n"), "any", &one),
            (&format!("{one}  a (b).img\n"), "a (b).img", &one),
        ] {
            assert_eq!(pick(text, name).ok(), Digest::from_hex(hex), "{text}");
        }
    }

    #[test]
    fn what_is_not_said_or_said_twice_is_no_sum() {
        let (one, other) = ("1f".repeat(32), "3f".repeat(32));
        for text in [
            String::new(),
            format!("{one}  cloud.img.sig\n"),
            format!("{}  cloud.img\n", "1f".repeat(20)),
            format!("MD5 (cloud.img) = {one}\n"),
            format!("SHA512 (cloud.img) = {one}\n"),
            format!("#{one}  cloud.img\n"),
            format!("{one}  cloud.img\n{other}  cloud.img\n"),
        ] {
            assert!(pick(&text, "cloud.img").is_err(), "{text}");
        }
        let said = pick(&format!("{one}  cloud.img\n{other}  cloud.img\n"), "cloud.img").unwrap_err();
        assert!(said.contains(&one) && said.contains(&other), "{said}");
    }
}
