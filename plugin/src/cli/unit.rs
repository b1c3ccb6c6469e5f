//! What systemd knows of virtseald, where there is a systemd: why it does not answer.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{Config, ConfigError};
use crate::model::advice::Advice;
use crate::model::deadlines::cli::SYSTEMD;

/// As systemd names it.
const UNIT: &str = "virtseald.service";
/// systemd runs here: see sd_booted(3).
const BOOTED: &str = "/run/systemd/system";

/// The state of the unit, in systemd's words.
#[derive(Debug, PartialEq)]
pub(super) struct Unit {
    active: String,
    sub: String,
    result: String,
    exit_status: Option<u8>,
}

impl Unit {
    /// Of the daemon that listens at this socket: none if it is no service of this host's systemd, or systemd does not say.
    pub(super) async fn of(socket: &Path) -> Option<Self> {
        let of_service = Path::new(Config::DEFAULT_SOCKET);
        let is_of_service = socket == of_service || socket == Config::hook_socket_beside(of_service);
        if !is_of_service || !Path::new(BOOTED).is_dir() {
            return None;
        }
        let show = Command::new("systemctl")
            .args([
                "show",
                "--property=LoadState,ActiveState,SubState,Result,ExecMainStatus",
                UNIT,
            ])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let shown = timeout(SYSTEMD, show).await.ok()?.ok()?;
        Self::parse(&String::from_utf8_lossy(&shown.stdout))
    }

    /// Of `KEY=VALUE` lines. A unit that systemd does not know says nothing.
    fn parse(shown: &str) -> Option<Self> {
        let value = |key: &str| {
            let mut lines = shown.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(found, _)| *found == key)
                .map(|(_, value)| value.to_owned())
        };
        (value("LoadState")? == "loaded").then_some(())?;
        Some(Self {
            active: value("ActiveState")?,
            sub: value("SubState")?,
            result: value("Result")?,
            exit_status: value("ExecMainStatus").and_then(|status| status.parse().ok()),
        })
    }

    fn has_failed(&self) -> bool {
        self.active == "failed" || self.result != "success"
    }

    /// For the end of a message.
    pub(super) fn told(&self) -> String {
        let mut why = vec![self.sub.clone()];
        if self.has_failed() {
            why.push(self.result.clone());
            why.extend(
                self.exit_status
                    .filter(|status| *status != 0)
                    .map(|status| format!("exit status {status}")),
            );
        }
        format!("systemd reports {UNIT} as {} ({})", self.active, why.join(", "))
    }

    /// What leads out of this state; none if it is as it should be.
    pub(super) fn advice(&self) -> Option<Advice> {
        if !self.has_failed() {
            return None;
        }
        Some(match self.exit_status {
            Some(ConfigError::EXIT_STATUS) => Advice::CheckSettings.then(Advice::StartAnew),
            _ => Advice::ShowDaemon.also(Advice::Journal).then(Advice::StartAnew),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(load: &str, active: &str, sub: &str, result: &str, status: u8) -> String {
        format!(
            "ExecMainStatus={status}\nLoadState={load}\nActiveState={active}\nSubState={sub}\nResult={result}\n"
        )
    }

    #[test]
    fn a_unit_is_told_as_it_is() {
        let unit = |text: String| Unit::parse(&text).unwrap();
        let runs = unit(shown("loaded", "active", "running", "success", 0));
        assert_eq!(
            runs.told(),
            "systemd reports virtseald.service as active (running)"
        );
        assert_eq!(runs.advice(), None);

        let mistaken = unit(shown("loaded", "failed", "failed", "exit-code", 78));
        assert_eq!(
            mistaken.told(),
            "systemd reports virtseald.service as failed (failed, exit-code, exit status 78)"
        );
        let next = mistaken.advice().unwrap().to_string();
        assert!(
            next.starts_with("virtseald --check /etc/virtseal/virtseald.yaml"),
            "{next}"
        );

        // Between two tries.
        let again = unit(shown("loaded", "activating", "auto-restart", "exit-code", 1));
        assert!(
            again
                .told()
                .contains("activating (auto-restart, exit-code, exit status 1)")
        );
        let next = again.advice().unwrap().to_string();
        assert!(
            next.contains("journalctl -u virtseald") && next.contains("reset-failed"),
            "{next}"
        );
    }

    #[test]
    fn who_does_not_know_the_unit_says_nothing() {
        for text in [
            "",
            "Failed to connect to bus\n",
            &shown("not-found", "inactive", "dead", "success", 0),
        ] {
            assert_eq!(Unit::parse(text), None, "{text}");
        }
    }
}
