use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::pool::QemuIds;
use super::*;
use crate::config::Config;
use crate::host::libvirt::StoragePool;
use crate::model::problem::{Code, Problem};

/// Somebody who is not root.
const USER: u32 = 12_345;

/// A tree below a directory that root alone can write, all the way from `/`.
struct Tree {
    dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        // /tmp is for everybody to write.
        let dir = tempfile::Builder::new()
            .prefix("virtseal-paths-")
            .tempdir_in("/var/lib")
            .unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let tree = Self { dir };
        for name in ["images", "other"] {
            fs::create_dir(tree.at(name)).unwrap();
        }
        tree
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        fs::write(self.at(name), name).unwrap();
        self.at(name)
    }

    fn users_dir(&self, name: &str) -> PathBuf {
        fs::create_dir(self.at(name)).unwrap();
        chown(self.at(name), Some(USER), Some(USER)).unwrap();
        self.at(name)
    }

    fn rule(&self) -> PathRule {
        PathRule::new(&[], &[self.at("images")], &self.at("state"))
    }

    fn content(&self, place: &PermittedPath) -> io::Result<String> {
        io::read_to_string(place.open(OpenOptions::new().read(true))?)
    }
}

fn link_by(owner: u32, target: impl AsRef<Path>, link: &Path) {
    symlink(target, link).unwrap();
    std::os::unix::fs::lchown(link, Some(owner), Some(owner)).unwrap();
}

#[test]
fn only_the_directories_are_permitted_and_the_refusal_names_the_line() {
    let tree = Tree::new();
    let rule = tree.rule();
    let inside = tree.file("images/a");
    assert_eq!(tree.content(&rule.permit(&inside).unwrap()).unwrap(), "images/a");
    assert!(!rule.permit(&tree.at("images/new")).unwrap().exists());
    let outside = tree.file("other/b");
    let refused = Problem::from(rule.permit(&outside).unwrap_err());
    assert_eq!(refused.code, Code::Denied);
    let line = format!(
        "image_dirs: [{}, {}]",
        tree.at("images").display(),
        tree.at("other").display()
    );
    assert!(refused.to_string().contains(&line), "{refused}");
    // What it says leads out.
    let config = Config::parse(&line, Path::new("x")).unwrap();
    config.path_rule().permit(&outside).unwrap();
    for odd in [
        "images/a",
        "/",
        "/images/\0",
        &format!("{}/../other/b", tree.at("images").display()),
    ] {
        assert!(
            matches!(rule.permit(Path::new(odd)), Err(PathError::Odd(_))),
            "{odd}"
        );
    }
    let missing = rule.permit(&tree.at("images/none/a")).unwrap_err();
    assert!(missing.is_missing(), "{missing}");
}

#[test]
fn a_known_path_is_permitted_wherever_it_is_but_not_through_a_link_of_others() {
    let tree = Tree::new();
    let (known, home) = (tree.file("other/b"), tree.users_dir("home"));
    tree.rule().permit_known(&known, [&known].into_iter()).unwrap();
    assert!(
        tree.rule()
            .permit_known(&known, [tree.at("other/c")].into_iter())
            .is_err()
    );
    link_by(USER, &known, &home.join("b"));
    let planted = home.join("b");
    let refused = tree.rule().permit_known(&planted, [&planted].into_iter());
    assert!(matches!(refused, Err(PathError::Link { .. })), "{refused:?}");
}

#[test]
fn a_link_is_followed_only_where_root_alone_could_have_made_it() {
    let tree = Tree::new();
    let victim = tree.file("other/victim");
    let rule = tree.rule();
    // As LVM has it: a relative link of root's, to another directory.
    link_by(0, "../other/victim", &tree.at("images/lv"));
    assert_eq!(
        tree.content(&rule.permit(&tree.at("images/lv")).unwrap())
            .unwrap(),
        "other/victim"
    );
    // The link belongs to somebody else.
    link_by(USER, &victim, &tree.at("images/planted"));
    // Its directory does, or is for others to write, or for a group.
    for (name, mode) in [
        ("images/home", 0o755),
        ("images/sticky", 0o1777),
        ("images/group", 0o775),
    ] {
        let home = tree.users_dir(name);
        if mode != 0o755 {
            chown(&home, Some(0), Some(0)).unwrap();
        }
        fs::set_permissions(&home, fs::Permissions::from_mode(mode)).unwrap();
        link_by(0, &victim, &home.join("by-root"));
        fs::create_dir(home.join("below")).unwrap();
        link_by(0, &victim, &home.join("below/by-root"));
    }
    for name in [
        "planted",
        "home/by-root",
        "sticky/by-root",
        "group/by-root",
        "home/below/by-root",
    ] {
        let refused = rule.permit(&tree.at("images").join(name));
        assert!(
            matches!(refused, Err(PathError::Link { .. })),
            "{name}: {refused:?}"
        );
    }
    // Also as a directory on the way.
    link_by(USER, tree.at("other"), &tree.at("images/home/dir"));
    assert!(matches!(
        rule.permit(&tree.at("images/home/dir/victim")),
        Err(PathError::Link { .. })
    ));
    link_by(0, "loop", &tree.at("images/loop"));
    assert!(matches!(
        rule.permit(&tree.at("images/loop")),
        Err(PathError::Loop(_))
    ));
}

#[test]
fn a_hard_link_is_refused_where_others_can_write() {
    let tree = Tree::new();
    let home = tree.users_dir("images/home");
    fs::hard_link(tree.file("other/victim"), home.join("disk")).unwrap();
    let refused = tree.rule().permit(&home.join("disk"));
    assert!(matches!(refused, Err(PathError::HardLink(_))), "{refused:?}");
    // A snapshot that root keeps by hard links is root's.
    fs::hard_link(tree.file("images/a"), tree.at("other/a")).unwrap();
    tree.rule().permit(&tree.at("images/a")).unwrap();
}

#[test]
fn what_was_permitted_stays_what_it_was_whatever_becomes_of_the_path() {
    let tree = Tree::new();
    let home = tree.users_dir("images/home");
    tree.file("images/home/disk");
    let victims = tree.users_dir("victims");
    fs::write(victims.join("disk"), "victim").unwrap();
    let place = tree.rule().permit(&home.join("disk")).unwrap();
    fs::rename(&home, tree.at("images/moved")).unwrap();
    link_by(USER, &victims, &home);
    assert_eq!(tree.content(&place).unwrap(), "images/home/disk");
    fs::remove_file(tree.at("images/moved/disk")).unwrap();
    link_by(USER, victims.join("disk"), &tree.at("images/moved/disk"));
    assert!(place.open(OpenOptions::new().read(true)).is_err());
    assert!(place.metadata().unwrap().is_symlink());
}

#[test]
fn no_flip_of_links_leads_anywhere_else() {
    let tree = Tree::new();
    let home = tree.users_dir("images/home");
    fs::create_dir(home.join("dir")).unwrap();
    fs::write(home.join("dir/disk"), "own").unwrap();
    fs::create_dir(tree.at("other/dir")).unwrap();
    fs::write(tree.at("other/dir/disk"), "victim").unwrap();
    link_by(USER, tree.at("other/dir"), &home.join("link"));
    let stop = AtomicBool::new(false);
    let mut reached = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let swap = |from: &str, to: &str| {
                let (from, to) = (home.join(from), home.join(to));
                nix::fcntl::renameat2(
                    nix::fcntl::AT_FDCWD,
                    &from,
                    nix::fcntl::AT_FDCWD,
                    &to,
                    nix::fcntl::RenameFlags::RENAME_EXCHANGE,
                )
                .unwrap();
            };
            while !stop.load(Ordering::Relaxed) {
                swap("dir", "link");
            }
        });
        for _ in 0..3000 {
            if let Ok(place) = tree.rule().permit(&home.join("dir/disk")) {
                assert_eq!(tree.content(&place).unwrap(), "own");
                reached += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reached > 0, "the link was always there: nothing was shown");
}

fn pool(kind: &str, path: impl Into<PathBuf>) -> StoragePool {
    StoragePool {
        kind: kind.to_owned(),
        path: path.into(),
    }
}

/// At the top, as admins make it: no directory of the Filesystem Hierarchy Standard.
fn data_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("virtseal-pool-")
        .tempdir_in("/")
        .unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    dir
}

#[test]
fn a_pool_opens_its_volumes_and_nothing_below_them() {
    let dir = data_dir();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("disk"), "").unwrap();
    fs::create_dir(at("backups")).unwrap();
    fs::write(at("backups/disk"), "").unwrap();
    let rule = PathRule::default().with_pools(vec![pool("dir", dir.path())]);
    rule.permit(&at("disk")).unwrap();
    rule.permit(&at("new")).unwrap();
    for outside in ["backups/disk", "backups/none"] {
        let refused = rule.permit(&at(outside));
        assert!(matches!(refused, Err(PathError::Outside { .. })), "{refused:?}");
    }
    for kind in ["disk", "iscsi", "mpath", "scsi", "logical", ""] {
        let rule = PathRule::default().with_pools(vec![pool(kind, dir.path())]);
        assert!(rule.permit(&at("disk")).is_err(), "{kind}");
    }
    // Not active, as far as the rule was told.
    assert!(PathRule::default().permit(&at("disk")).is_err());
}

#[test]
fn a_pool_that_was_planted_over_a_directory_of_roots_opens_nothing() {
    let dir = data_dir();
    let opens = |mode: u32, (owner, group): (u32, u32)| {
        let at = dir.path().join("pool");
        let _ = fs::remove_dir_all(&at);
        fs::create_dir(&at).unwrap();
        chown(&at, Some(owner), Some(group)).unwrap();
        fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
        pool::opens(&pool("dir", &at), &QemuIds::of([USER], [USER + 1]))
    };
    for (mode, owner) in [
        (0o711, (0, 0)),
        (0o755, (0, USER + 1)),
        (0o770, (0, USER + 1)),
        (0o700, (USER, 0)),
    ] {
        assert!(opens(mode, owner), "{mode:o} {owner:?}");
    }
    for (mode, owner) in [
        // Root's own, which QEMU could not even enter.
        (0o700, (0, 0)),
        (0o750, (0, 0)),
        (0o750, (0, USER + 2)),
        // What somebody else may change.
        (0o777, (0, 0)),
        (0o1777, (0, 0)),
        (0o775, (0, USER + 2)),
        (0o755, (USER + 2, 0)),
    ] {
        assert!(!opens(mode, owner), "{mode:o} {owner:?}");
    }
    // Below such a one.
    let inner = dir.path().join("pool/inner");
    assert!(opens(0o755, (0, 0)));
    fs::create_dir(&inner).unwrap();
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o755)).unwrap();
    let opens_inner = || pool::opens(&pool("dir", &inner), &QemuIds::default());
    assert!(opens_inner());
    for mode in [0o700, 0o777] {
        fs::set_permissions(dir.path().join("pool"), fs::Permissions::from_mode(mode)).unwrap();
        assert!(!opens_inner(), "{mode:o}");
    }
}

#[test]
fn a_pool_opens_no_directory_of_the_system_and_no_link_of_others() {
    let tree = Tree::new();
    for path in [
        "/",
        "/etc",
        "/usr/share",
        "/opt",
        "/boot",
        "/root",
        "/proc/self",
        "/dev",
        "/var",
        "/var/lib",
        "/var/backups",
        "/tmp",
        "/run",
    ] {
        let rule = PathRule::default().with_pools(
            ["dir", "fs", "netfs", "logical"]
                .map(|kind| pool(kind, path))
                .to_vec(),
        );
        assert!(rule.grounds().is_empty(), "{path}");
    }
    let data = data_dir();
    let home = data.path().join("home");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(USER), Some(USER)).unwrap();
    link_by(USER, tree.at("other"), &home.join("pool"));
    link_by(USER, data.path(), &data.path().join("link"));
    for planted in [home.join("pool"), data.path().join("link"), home.clone()] {
        let rule = PathRule::default().with_pools(vec![pool("dir", &planted)]);
        assert!(rule.grounds().is_empty(), "{planted:?}");
    }
}

#[test]
fn of_what_is_outside_nothing_is_told() {
    let tree = Tree::new();
    let secrets = tree.at("secrets");
    fs::create_dir_all(secrets.join("dir")).unwrap();
    fs::write(secrets.join("file"), "QFI\u{fb}").unwrap();
    nix::unistd::mkfifo(&secrets.join("fifo"), Mode::S_IRWXU).unwrap();
    link_by(0, "file", &secrets.join("link"));
    link_by(0, "loop", &secrets.join("loop"));
    link_by(USER, "/etc/shadow", &secrets.join("planted"));
    fs::set_permissions(&secrets, fs::Permissions::from_mode(0o700)).unwrap();
    let rule = tree.rule();
    let said = |name: &str| {
        let refused = rule.permit(&secrets.join("x").with_file_name(name)).unwrap_err();
        assert!(
            matches!(refused, PathError::Outside { .. }),
            "{name}: {refused:?}"
        );
        Problem::from(refused)
            .to_string()
            .replace(&format!("/{name} "), "/NAME ")
    };
    let of_none = said("none");
    for name in ["file", "dir", "fifo", "link", "loop", "planted"] {
        assert_eq!(said(name), of_none, "{name}");
    }
    // Nor by what is on the way.
    for on_the_way in ["dir/x", "file/x", "none/x", "loop/x", "planted/x"] {
        let refused = rule.permit(&secrets.join(on_the_way)).unwrap_err();
        assert!(
            matches!(refused, PathError::Outside { .. }),
            "{on_the_way}: {refused:?}"
        );
    }
}

#[test]
fn a_directory_of_image_dirs_that_permits_nothing_says_why() {
    let tree = Tree::new();
    let home = tree.users_dir("home");
    link_by(USER, tree.at("other"), &home.join("link"));
    let rule = PathRule::new(&[], &[home.join("link"), tree.at("none")], &tree.at("state"));
    let refused = rule.permit(&home.join("link/disk"));
    assert!(matches!(refused, Err(PathError::Link { .. })), "{refused:?}");
    assert!(rule.permit(&tree.at("none/disk")).unwrap_err().is_missing());
}

#[test]
fn only_a_regular_file_or_a_block_device_is_opened() {
    let tree = Tree::new();
    let fifo = tree.at("images/fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let socket = tree.at("images/socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::create_dir(tree.at("images/dir")).unwrap();
    for path in [fifo, socket, tree.at("images/dir")] {
        let place = tree.rule().permit(&path).unwrap();
        let refused = place.open(OpenOptions::new().read(true)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{path:?}");
    }
    let zero = PermittedPath::named_by_root(Path::new("/dev/zero")).unwrap();
    assert!(zero.open(OpenOptions::new().read(true)).is_err());
}

/// Files in which a path is opened that this process, root's configuration or a command line has chosen. Whoever comes to need
/// another: a path from domain XML, from an image or from a store of libvirt's is opened by `PermittedPath::open` alone.
const OPEN_PATHS_OF_ROOT: [&str; 36] = [
    "audit/chain.rs",
    "audit/segments.rs",
    "audit/tail.rs",
    "cli/new_backup.rs",
    "cli/passphrase.rs",
    "cli/signature.rs",
    "cli/sums.rs",
    "cli/tpm.rs",
    "cli/trust.rs",
    "config.rs",
    "daemon/hook_seen.rs",
    "daemon/program.rs",
    "daemon/unlock_at_start.rs",
    "host/boot.rs",
    "host/libvirt/qemu_conf.rs",
    "host/mounts.rs",
    "host/own_process.rs",
    "host/permitted/pool.rs",
    "host/process.rs",
    "host/secure_boot.rs",
    "host/tpm/session.rs",
    "host/tpm/signed.rs",
    "object/disk/staging.rs",
    "provider/conformance/cases.rs",
    "provider/kmip.rs",
    "provider/kmip/store.rs",
    "provider/pkcs11/settings.rs",
    "provider/toolbox/files.rs",
    "provider/transit/wire.rs",
    "state_backup.rs",
    "state_backup/restore.rs",
    "store/sqlite/database.rs",
    "store/sqlite/hook_index.rs",
    "vm/forgotten.rs",
    "vm/seal/firmware/descriptor.rs",
    "vm/snapshot/off.rs",
];

#[test]
fn nothing_else_opens_a_file_by_its_path() {
    const OPENERS: [&str; 8] = [
        "File::open(",
        "File::create(",
        "OpenOptions::new()",
        "fs::read(",
        "fs::read_to_string(",
        "fs::write(",
        "fs::copy(",
        "fcntl::open",
    ];
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![source.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            // Tests stand at the end of a file, or in one of their own.
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let by_place = code
                .replace("place.open(OpenOptions::new()", "")
                .replace(".open(OpenOptions::new()", "");
            let is_test = ["tests", "fixture", "stand", "crash", "bao", "documented", "rooms"]
                .iter()
                .any(|part| name.contains(part));
            if !is_test && OPENERS.iter().any(|opener| by_place.contains(opener)) {
                found.push(name);
            }
        }
    }
    found.retain(|name| !OPEN_PATHS_OF_ROOT.contains(&name.as_str()));
    assert!(found.is_empty(), "{found:?}: see OPEN_PATHS_OF_ROOT");
}

#[test]
fn nothing_in_the_state_directory_is_a_vms() {
    let tree = Tree::new();
    let state = tree.at("images/state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("keystore.db"), "").unwrap();
    let rule = PathRule::new(&[], &[tree.at("images")], &state);
    for path in [state.join("keystore.db"), state.join("new")] {
        assert!(matches!(rule.permit(&path), Err(PathError::OfVirtseal(_))));
    }
}

#[test]
fn a_template_comes_with_the_firmware_or_is_for_all_to_read_or_of_image_dirs() {
    let tree = Tree::new();
    let secret = |path: PathBuf| {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let rule = PathRule::new(&[&tree.at("other")], &[tree.at("images")], &tree.at("state"));
    rule.permit_template(&tree.file("other/public"), &[]).unwrap();
    rule.permit_template(&secret(tree.file("images/named")), &[])
        .unwrap();
    let of_another_vm = secret(tree.file("other/private"));
    let refused = rule.permit_template(&of_another_vm, &[]);
    assert!(matches!(refused, Err(PathError::Private { .. })), "{refused:?}");
    rule.permit_template(&of_another_vm, std::slice::from_ref(&of_another_vm))
        .unwrap();
    for path in ["/etc/shadow", "/etc/passwd"] {
        assert!(rule.permit_template(Path::new(path), &[]).is_err(), "{path}");
    }
    rule.permit_template(Path::new("/usr/share/doc"), &[]).unwrap();
}

#[test]
fn a_look_goes_to_a_directory_once_and_the_next_one_judges_it_anew() {
    let tree = Tree::new();
    let victim = tree.file("other/victim");
    let look = tree.rule().for_one_look();
    let [first, second] = ["images/first", "images/second"].map(|name| tree.file(name));
    look.permit(&first).unwrap();
    // What is in it is judged by itself.
    link_by(USER, &victim, &tree.at("images/planted"));
    let refused = look.permit(&tree.at("images/planted"));
    assert!(matches!(refused, Err(PathError::Link { .. })), "{refused:?}");
    link_by(0, &victim, &tree.at("images/lv"));
    for path in [&tree.at("images/lv"), &second] {
        tree.content(&look.permit(path).unwrap()).unwrap();
    }
    // Another directory that is reached by the same name is not the one that was judged.
    fs::rename(tree.at("images"), tree.at("was")).unwrap();
    fs::create_dir(tree.at("images")).unwrap();
    chown(tree.at("images"), Some(USER), Some(USER)).unwrap();
    tree.file("images/second");
    fs::hard_link(&victim, tree.at("images/linked")).unwrap();
    let held = look.permit(&second).unwrap();
    assert_eq!(fs::canonicalize(held.directory_handle()).unwrap(), tree.at("was"));
    let next = tree.rule().for_one_look();
    let found = next.permit(&second).unwrap();
    assert_eq!(
        fs::canonicalize(found.directory_handle()).unwrap(),
        tree.at("images")
    );
    let refused = next.permit(&tree.at("images/linked"));
    assert!(matches!(refused, Err(PathError::HardLink(_))), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However somebody arranges the tree that is his, what is permitted below it is his or was never there.
    #[test]
    fn nothing_of_roots_is_reached_through_a_tree_of_others(
        names in proptest::collection::vec((0_u8..4, 0_u8..3), 1..8),
        ask in proptest::collection::vec(0_u8..4, 1..5),
    ) {
        let tree = Tree::new();
        let home = tree.users_dir("images/home");
        tree.file("other/0");
        let mut dirs = vec![home.clone()];
        for (name, kind) in names {
            let at = dirs[usize::from(name) % dirs.len()].join(name.to_string());
            let made = match kind {
                0 => fs::create_dir(&at).map(|()| dirs.push(at.clone())),
                1 => symlink(tree.at("other"), &at),
                _ => symlink("../../../other/0", &at),
            };
            if made.is_ok() {
                std::os::unix::fs::lchown(&at, Some(USER), Some(USER)).unwrap();
            }
        }
        let path = ask.iter().fold(home, |path, name| path.join(name.to_string()));
        // Whoever has looked at what is beside it is told the same.
        let (alone, look) = (tree.rule(), tree.rule().for_one_look());
        for beside in path.ancestors().take(ask.len()).flat_map(|at| (0..4).map(|name| at.with_file_name(name.to_string()))) {
            let told = |rule: &PathRule| {
                let permitted = rule.permit(&beside).map_err(|error| error.to_string());
                permitted.map(|place| fs::canonicalize(place.directory_handle()).unwrap())
            };
            prop_assert_eq!(told(&alone), told(&look), "{:?}", beside);
        }
        if let Ok(place) = tree.rule().permit(&path) {
            let real = fs::canonicalize(place.directory_handle()).unwrap();
            prop_assert!(real.starts_with(tree.at("images/home")), "{:?} led to {:?}", path, real);
            prop_assert!(!place.metadata().is_ok_and(|found| found.is_symlink()));
        }
    }
}
