//! What the settings name and this host does not have: nobody would notice before a seal, or a reader, is refused.

use super::Daemon;

impl Daemon {
    /// One line for each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let config = self.config();
        let unknown = config
            .recipients
            .iter()
            .filter(|name| self.recipients.find(name).is_err());
        let mut warnings: Vec<_> = unknown
            .map(|name| {
                format!(
                    "recipients in virtseald.yaml names '{name}', and there is no such key provider on this host: \
                     nothing new is sealed until there is. Next: virtseal provider list"
                )
            })
            .collect();
        if self.reader_group().is_none() {
            let group = config.socket_group;
            warnings.push(format!(
                "socket_group in virtseald.yaml is '{group}', and there is no such group on this host: only root may \
                 connect. Next: groupadd --system {group}, then systemctl restart virtseald"
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_the_host_does_not_have_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: dir.path().into(),
            socket_group: "root".into(),
            ..Config::default()
        };
        let daemon = Daemon::open(config.clone()).unwrap();
        assert!(daemon.warnings().is_empty());
        daemon.reload(Config {
            recipients: vec!["nosuch".into()],
            ..config.clone()
        });
        assert!(daemon.warnings()[0].contains("'nosuch'"));
        drop(daemon);
        let daemon = Daemon::open(Config {
            socket_group: "no-such-group".into(),
            ..config
        })
        .unwrap();
        assert!(daemon.warnings()[0].contains("'no-such-group'"));
    }
}
