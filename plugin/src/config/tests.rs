use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::domain::{Domain, Permission, Policy};

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("virtseald.yaml")).map_err(|error| crate::model::problem::chain(&error))
}

fn domain(name: &str) -> Domain {
    let id = uuid::Uuid::from_u128(7);
    Domain::parse(&format!(
        "<domain type='kvm'><name>{name}</name><uuid>{id}</uuid></domain>"
    ))
    .unwrap()
}

#[test]
fn comments_alone_mean_defaults() {
    assert_eq!(parse("# socket: /x\n\n").unwrap(), Config::default());
}

#[test]
fn durations_have_units() {
    let config = parse("hook_deadline: 1500ms\nprovider_deadline: 1").unwrap();
    assert_eq!(config.hook_deadline, Duration::from_millis(1500));
    assert_eq!(config.provider_deadline, Duration::from_secs(1));
    assert!(
        parse("hook_deadline: 0s")
            .unwrap_err()
            .contains("a duration of more than 0")
    );
    assert_eq!(parse("interval: 0").unwrap().interval, Duration::ZERO);
    assert!(parse("hook_deadline: -1").is_err());
    assert!(parse("hook_deadline: 10 parsecs").is_err());
}

#[test]
fn bad_value_names_line_key_and_what_the_key_takes() {
    for (text, said) in [
        (
            "# first\nlog: info\nhook_deadline: soon",
            "3: hook_deadline: 'soon' is not a duration",
        ),
        ("interval: -1s", "1: interval: '-1s' is not a duration: 0"),
        (
            "socket: /x\n\nlog: loud",
            "3: log: 'loud' is not one of error, warn, info, debug, trace",
        ),
        ("log: [1]\n", "1: log: '- 1' is not one of error"),
        ("recipients: main", "1: recipients: 'main' is not a list of names"),
        (
            "recipients:\n- main\nbatch_size: -1",
            "3: batch_size: '-1' is not a whole number",
        ),
        ("tpm: the chip", "1: tpm: 'the chip' is not device:/dev/tpmrm0"),
        ("socket: [/x]", "1: socket: '- /x' is not a path"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with(&format!("virtseald.yaml:{said}")), "{error}");
    }
}

#[test]
fn a_file_of_another_shape_is_told_what_settings_look_like() {
    for text in ["- a", "socket", "42"] {
        assert_eq!(
            parse(text).unwrap_err(),
            "virtseald.yaml:1: settings are lines such as 'hook_deadline: 10s'"
        );
    }
}

#[test]
fn repeated_key_names_both_lines() {
    assert_eq!(
        parse("log: info\nsocket: /x\nlog: debug").unwrap_err(),
        "virtseald.yaml:3: 'log' is set in line 1 already"
    );
}

#[test]
fn misspelt_key_names_file_line_and_nearest_key() {
    assert_eq!(
        parse("socket: /run/x\nprovder_deadline: 3s").unwrap_err(),
        "virtseald.yaml:2: unknown key 'provder_deadline'; perhaps 'provider_deadline' is meant"
    );
}

#[test]
fn recipients_and_batches_have_their_bounds() {
    let config = parse("recipients: [kmip-prod, breakglass]\nbatch_size: 7").unwrap();
    assert_eq!(
        (config.recipients, config.batch_size),
        (vec!["kmip-prod".to_owned(), "breakglass".to_owned()], 7)
    );
    assert!(
        parse("recipients: ['']")
            .unwrap_err()
            .contains("names of providers")
    );
    assert_eq!(
        parse("log: info\n\nbatch_size: 0").unwrap_err(),
        "virtseald.yaml:3: batch_size must be 1 to 1000"
    );
}

#[test]
fn policy_of_the_hook_is_sent_to_the_hooks_file() {
    assert!(parse("require_sealed: true").unwrap_err().contains("hook.conf"));
}

#[test]
fn the_policy_allows_nothing_by_itself_and_a_vm_goes_before_the_host() {
    let of = |text: &str, name: &str| parse(text).unwrap().policy.of(&domain(name));
    let (yes, no) = (Permission::Yes, Permission::No);
    assert_eq!(of("log: info", "a"), Policy::default());
    let text = "policy:\n  memory_on_disk: yes\n  mixed_disks: false\n  vms:\n    a: {memory_on_disk: no, mixed_disks: true}\n";
    assert_eq!(
        (of(text, "a").memory_on_disk, of(text, "b").memory_on_disk),
        (no, yes)
    );
    assert_eq!((of(text, "a").mixed_disks, of(text, "b").mixed_disks), (yes, no));
    let text =
        "policy: {vms: {a: {plain_backing: yes}, 00000000-0000-0000-0000-000000000007: {plain_backing: no}}}";
    assert_eq!(of(text, "a").plain_backing, no);
}

#[test]
fn a_misspelt_policy_is_an_error_with_its_line() {
    for (text, parts) in [
        (
            "log: info\npolicy:\n  memory_on_dsik: yes\n",
            ["yaml:3", "memory_on_disk"],
        ),
        (
            "policy:\n  vms:\n    a:\n      mixed_disk: yes\n",
            ["yaml:4", "mixed_disks"],
        ),
        ("policy: {memory_on_disk: maybe}\n", ["yaml:1", "yes or no"]),
        ("policy: [memory_on_disk]\n", ["yaml:1", "yes or no"]),
    ] {
        let error = parse(text).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn relative_paths_and_swapped_deadlines_are_refused() {
    assert_eq!(
        parse("log: info\nstate_dir: here").unwrap_err(),
        "virtseald.yaml:2: state_dir: 'here' must be an absolute path"
    );
    assert_eq!(
        parse("image_dirs: [/srv, vms]").unwrap_err(),
        "virtseald.yaml:1: image_dirs: 'vms' must be an absolute path"
    );
    assert_eq!(
        parse("image_dirs: [/srv]").unwrap().image_dirs,
        [Path::new("/srv")]
    );
    assert!(
        parse("hook_deadline: 1s")
            .unwrap_err()
            .contains("provider_deadline")
    );
}

#[test]
fn every_key_is_listed_for_hints() {
    for key in Config::KEYS {
        let error = parse(&format!("{key}: {{a: 1}}")).unwrap_err();
        assert!(!error.contains(&format!("unknown key '{key}'")), "{key}: {error}");
    }
}

#[test]
fn a_running_daemon_takes_over_what_it_can_and_says_what_it_keeps() {
    let mut config = parse("socket: /x\nhook_deadline: 20s").unwrap();
    let new = parse("socket: /y\nhook_deadline: 30s\nlog: debug").unwrap();
    assert_eq!(config.reload(new), ["socket", "log"]);
    assert_eq!(config, parse("socket: /x\nhook_deadline: 30s").unwrap());
    assert!(config.reload(config.clone()).is_empty());
}

#[test]
fn garbage_is_an_error_with_a_line() {
    assert!(
        parse("socket: /x\n\tfoo")
            .unwrap_err()
            .starts_with("virtseald.yaml:2")
    );
    assert!(parse("- a\n- b").is_err());
}

/// The package's file, with `#` before each setting taken away.
fn packaged() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join("packaging/config/virtseald.yaml")).unwrap()
}

fn settings_of(packaged: &str) -> String {
    let (mut settings, mut is_setting) = (String::new(), false);
    for line in packaged.lines().filter_map(|line| line.strip_prefix('#')) {
        is_setting =
            line.starts_with(|c: char| c.is_ascii_lowercase()) || (is_setting && line.starts_with("  "));
        if is_setting {
            settings += &format!("{line}\n");
        }
    }
    settings
}

#[test]
fn the_packaged_file_has_each_setting_with_its_default() {
    let text = settings_of(&packaged());
    let named: Vec<_> = mistakes::keys(&text).map(|(_, key)| key).collect();
    for key in Config::KEYS {
        assert!(named.contains(key), "{key} is not in the packaged file");
    }
    let mut config = parse(&text).unwrap();
    assert_eq!(config.hook_socket.take(), Some(Config::default().hook_socket()));
    for (name, mixed_disks) in [("web01", Permission::Yes), ("other", Permission::No)] {
        let expected = Policy {
            mixed_disks,
            ..Policy::default()
        };
        assert_eq!(config.policy.of(&domain(name)), expected, "{name}");
    }
    config.policy = Policies::default();
    assert_eq!(config, Config::default());
}

#[test]
fn what_a_reload_leaves_is_told_where_settings_are() {
    let fixed = Config::fixed();
    let (last, others) = fixed.split_last().unwrap();
    let list = format!("{} and {last}", others.join(", "));
    let packaged = packaged();
    let words: Vec<_> = packaged.split_whitespace().filter(|word| *word != "#").collect();
    assert!(words.join(" ").contains(&list), "{list}");
    let settings = include_str!("../../../docs/reference/settings.md");
    let marked: Vec<_> = settings
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` * |"))
        .map(|(key, _)| key)
        .collect();
    assert_eq!(BTreeSet::from_iter(marked), BTreeSet::from_iter(fixed));
}
