//! The settings: each once, in one table, from which come its type, default and words, the keys that hints name, and what a
//! running daemon takes over.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::duration::{duration, pause};
use super::log_filter::LogFilter;
use super::policy::Policies;
use crate::host::permitted::PathRule;
use crate::host::tpm::Tcti;
use crate::model::advice::Advice;
use crate::model::deadlines;

/// The most envelopes that a job may have in memory.
pub(super) const MAX_BATCH: u32 = 1000;

/// Each setting once: its type, what it is without a line in the file, what it takes, and whether a running daemon takes
/// another value (`live`) or only a restart does (`fixed`).
macro_rules! settings {
    ($($(#[$attribute:meta])* $reload:ident $key:ident: $type:ty = $default:expr, $takes:expr;)*) => {
        /// The daemon's settings. Every key has a default.
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(crate) struct Config {
            $($(#[$attribute])* pub $key: $type,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }

        impl Config {
            pub(super) const KEYS: &[&str] = &[$(stringify!($key)),*];

            /// Those that only a restart changes.
            #[cfg(test)]
            pub(super) fn fixed() -> Vec<&'static str> {
                let all = [$((stringify!($key), stringify!($reload))),*];
                all.into_iter().filter(|(_, reload)| *reload == "fixed").map(|(key, _)| key).collect()
            }

            /// What the key takes, in words.
            pub(super) fn expected(key: &str) -> String {
                match key {
                    $(stringify!($key) => $takes.into(),)*
                    _ => "a path".into(),
                }
            }

            /// Becomes `new` as far as a running daemon can, and says which keys it can't change.
            pub(crate) fn reload(&mut self, mut new: Self) -> Vec<&'static str> {
                let mut kept = Vec::new();
                $(settings!(@$reload $key self new kept);)*
                *self = new;
                kept
            }
        }
    };
    (@live $key:ident $old:ident $new:ident $kept:ident) => {};
    (@fixed $key:ident $old:ident $new:ident $kept:ident) => {
        if $old.$key != $new.$key {
            $new.$key = $old.$key.clone();
            $kept.push(stringify!($key));
        }
    };
}

const SOME_TIME: &str =
    "a duration of more than 0: '10s', '500ms', '2m' or a number of seconds, at most an hour";
const PERHAPS_NO_TIME: &str = "a duration: 0, '500ms', '10s', '2m' or a number of seconds, at most an hour";

settings! {
    /// Where the daemon listens.
    fixed socket: PathBuf = Config::DEFAULT_SOCKET.into(), "a path";
    /// Where the daemon listens for the hook: see [`Config::hook_socket`].
    fixed hook_socket: Option<PathBuf> = None, "a path";
    /// The group that may connect, and read.
    fixed socket_group: String = "virtseal".into(), "the name of a group";
    /// Keystore, sealed root keys, audit log.
    fixed state_dir: PathBuf = "/var/lib/virtseal".into(), "a path";
    /// The libvirt that starts the VMs.
    fixed libvirt_uri: String = "qemu:///system".into(), "a URI, such as qemu:///system";
    /// The most time that a start may wait for this daemon.
    #[serde(deserialize_with = "duration")]
    live hook_deadline: Duration = deadlines::start::HOOK, SOME_TIME;
    /// The most time that a provider gets for one call.
    #[serde(deserialize_with = "duration")]
    live provider_deadline: Duration = deadlines::start::PROVIDER, SOME_TIME;
    /// How often each provider is asked how it is.
    #[serde(deserialize_with = "duration")]
    live probe_interval: Duration = deadlines::provider::PROBE, SOME_TIME;
    /// Where libvirt keeps vTPM state, a directory per VM UUID.
    live swtpm_dir: PathBuf = "/var/lib/libvirt/swtpm".into(), "a path";
    /// Where new UEFI variable stores go when the domain names none.
    live nvram_dir: PathBuf = "/var/lib/libvirt/qemu/nvram".into(), "a path";
    /// Directories besides libvirt's own and its storage pools whose files domain XML may name for virtseal to change.
    live image_dirs: Vec<PathBuf> = Vec::new(), "a list of directories, such as [/srv/images]";
    /// The providers (names or UUIDs) that each new envelope gets a stanza of; the default provider alone, if empty.
    live recipients: Vec<String> = Vec::new(), "a list of names of providers, such as [kmip-prod, breakglass]";
    /// What sealed VMs may do beside their sealed objects.
    live policy: Policies = Policies::default(), format!(
            "a section with yes or no for {}, and below {} the same for single VMs",
            Policies::KEYS.join(", "),
            Policies::VMS
        );
    /// How many envelopes a job changes in one transaction.
    live batch_size: u32 = 50, format!("a whole number from 1 to {MAX_BATCH}");
    /// How long a job rests between two batches.
    #[serde(deserialize_with = "pause")]
    live interval: Duration = Duration::ZERO, PERHAPS_NO_TIME;
    /// How the TPM of this host is reached.
    fixed tpm: Tcti = Tcti::default(), "device:/dev/tpmrm0, tabrmd, swtpm:host=HOST,port=PORT or mssim:host=HOST,port=PORT";
    /// What to log.
    fixed log: LogFilter = LogFilter::default(), "one of error, warn, info, debug, trace, perhaps by module: info,virtseal=debug";
}

impl Config {
    /// Where the package puts it.
    pub(crate) const DEFAULT_PATH: &str = Advice::SETTINGS;
    /// The default of `socket`.
    pub(crate) const DEFAULT_SOCKET: &str = "/run/virtseal/virtseald.sock";

    /// Where root acts at paths that others have written, storage pools left out.
    pub(crate) fn path_rule(&self) -> PathRule {
        let own = [PathRule::IMAGES.as_ref(), &*self.nvram_dir, &*self.swtpm_dir];
        PathRule::new(&own, &self.image_dirs, &self.state_dir)
    }

    /// Where the daemon listens for the hook, and for root alone: a path of its own, or the one beside `socket`.
    pub(crate) fn hook_socket(&self) -> PathBuf {
        let beside = || Self::hook_socket_beside(&self.socket);
        self.hook_socket.clone().unwrap_or_else(beside)
    }

    /// The hook's socket of the daemon that listens on `socket`, unless its configuration names another:
    /// `virtseald.sock` has `hook.sock`, `second.sock` has `second-hook.sock`.
    pub(crate) fn hook_socket_beside(socket: &Path) -> PathBuf {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        socket.with_file_name(match name.strip_suffix(".sock") {
            Some("virtseald") => "hook.sock".to_owned(),
            Some(stem) => format!("{stem}-hook.sock"),
            None => format!("{name}-hook"),
        })
    }
}
