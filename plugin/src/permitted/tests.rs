use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;

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
        PathRule {
            image_dirs: vec![self.at("images")],
            state_dir: self.at("state"),
            ..PathRule::default()
        }
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
    let refused = Failure::from(rule.permit(&outside).unwrap_err());
    assert_eq!(refused.code, Code::Denied);
    let line = format!(
        "image_dirs: [{}, {}]",
        tree.at("images").display(),
        tree.at("other").display()
    );
    assert!(refused.to_string().contains(&line), "{refused}");
    // What it says leads out.
    let config = Config::parse(&line, Path::new("x")).unwrap();
    PathRule::of(&config).permit(&outside).unwrap();
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

#[test]
fn a_pool_opens_no_directory_of_the_system_and_no_link_of_others() {
    let tree = Tree::new();
    for path in [
        "/",
        "/etc",
        "/etc/libvirt",
        "/var",
        "/usr/share",
        "/root/x",
        "/proc/1",
    ] {
        assert!(!may_be_a_pool(Path::new(path)), "{path}");
    }
    for path in [
        "/srv",
        "/home/alice/vms",
        "/dev/vg0",
        "/mnt/nfs",
        "/var/lib/libvirt/images",
    ] {
        assert!(may_be_a_pool(Path::new(path)), "{path}");
    }
    let victim = tree.file("other/victim");
    let home = tree.users_dir("home");
    link_by(USER, tree.at("other"), &home.join("pool"));
    let rule = PathRule::default().with_pools(vec![home.join("pool")]);
    assert!(matches!(rule.permit(&victim), Err(PathError::Outside { .. })));
    let rule = PathRule::default().with_pools(vec![tree.at("other")]);
    rule.permit(&victim).unwrap();
}

#[test]
fn nothing_in_the_state_directory_is_a_vms() {
    let tree = Tree::new();
    let state = tree.at("images/state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("keystore.db"), "").unwrap();
    let rule = PathRule {
        state_dir: state.clone(),
        ..tree.rule()
    };
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
    let rule = PathRule {
        own: vec![tree.at("other")],
        ..tree.rule()
    };
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
        if let Ok(place) = tree.rule().permit(&path) {
            let real = fs::canonicalize(place.directory_handle()).unwrap();
            prop_assert!(real.starts_with(tree.at("images/home")), "{:?} led to {:?}", path, real);
            prop_assert!(!place.metadata().is_ok_and(|found| found.is_symlink()));
        }
    }
}
