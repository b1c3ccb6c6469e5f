//! What was found in files that have not changed since, so that a status that is looked at again and again does not open them all again.
//!
//! Whoever is to act at a file opens it: this is for showing. On a network file system the stamp is as old as its attributes may be there.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Located, ObjectError, Present};
use crate::host::file_stamp::FileStamp;

/// Of the last look, and of this one.
#[derive(Debug, Default)]
pub(crate) struct Inspected(Mutex<Looks>);

#[derive(Debug, Default)]
struct Looks {
    last: HashMap<PathBuf, (FileStamp, Present)>,
    this: HashMap<PathBuf, (FileStamp, Present)>,
}

impl Inspected {
    /// Forgets what the last look has not come to.
    pub(crate) fn begin_look(&self) {
        let mut looks = self.lock();
        looks.last = std::mem::take(&mut looks.this);
    }

    /// As [`Located::inspect`], of the file as it was when it had the stamp that it has.
    pub(crate) fn inspect(&self, object: &Located) -> Result<Present, ObjectError> {
        // Before it is opened: what is written after that gives it another.
        let Some(stamp) = object.stamp() else {
            return object.inspect();
        };
        let path = object.path();
        let known = self.lock().take(path, stamp);
        let present = match known {
            Some(present) => present,
            None => object.inspect()?,
        };
        self.lock().this.insert(path.to_owned(), (stamp, present.clone()));
        Ok(present)
    }

    fn lock(&self) -> MutexGuard<'_, Looks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Looks {
    fn take(&mut self, path: &std::path::Path, stamp: FileStamp) -> Option<Present> {
        let is_same = |(known, _): &(FileStamp, Present)| *known == stamp;
        let of_this = self.this.get(path).filter(|known| is_same(known)).cloned();
        let found = of_this.or_else(|| self.last.remove(path).filter(is_same));
        found.map(|(_, present)| present)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;
    use crate::host::permitted::PermittedPath;
    use crate::model::deadlines::status::SETTLED;

    #[test]
    fn what_was_found_is_shown_until_the_file_changes_and_forgotten_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let write = |bytes: &[u8]| {
            let mut image = vec![0; 1 << 20];
            image[..bytes.len()].copy_from_slice(bytes);
            fs::write(&path, image).unwrap();
        };
        let object = Located::Image(PermittedPath::named_by_root(&path).unwrap());
        let inspected = Inspected::default();
        let is_plain = || matches!(inspected.inspect(&object), Ok(Present::Plain));
        let known = || inspected.lock().this.len();
        write(b"plain");
        assert!(is_plain());
        assert_eq!(known(), 0, "it may be written again at once");
        std::thread::sleep(SETTLED + Duration::from_millis(100));
        assert!(is_plain() && is_plain());
        assert_eq!(known(), 1);
        inspected.begin_look();
        assert!(is_plain(), "by the last look");
        write(b"QFI\xfb");
        assert!(!is_plain(), "no whole qcow2");
        inspected.begin_look();
        inspected.begin_look();
        assert!(inspected.lock().last.is_empty());
        fs::remove_file(&path).unwrap();
        assert!(matches!(inspected.inspect(&object), Ok(Present::Absent)));
    }
}
