//! What virtseald writes to systemd's journal, in its [native protocol](https://systemd.io/JOURNAL_NATIVE_PROTOCOL/): a line that names what it
//! is about, for whoever reads it, and the same as fields, such as `F_DOMAIN`, for whoever filters.

use std::fmt::{Debug, Write};
use std::io;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::model::deadlines::daemon::JOURNAL;
use crate::terminal::visible;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Of a value, in bytes: an entry of a few fields fits into one datagram.
const MAX_VALUE: usize = 16 * 1024;

pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// # Errors
    /// When nobody listens.
    pub(super) fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(JOURNAL))?;
        // An empty entry, which is dropped.
        socket.send_to(&[], SOCKET)?;
        Ok(Self(socket))
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let priority = match *event.metadata().level() {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "5",
            Level::DEBUG => "6",
            Level::TRACE => "7",
        };
        let mut entry = Vec::new();
        put(&mut entry, "PRIORITY", priority);
        put(&mut entry, "SYSLOG_IDENTIFIER", "virtseald");
        put(&mut entry, "TARGET", event.metadata().target());
        put(&mut entry, "MESSAGE", &fields.line());
        for (name, value) in fields.0.iter().filter(|(name, _)| *name != "message") {
            put(&mut entry, &format!("F_{}", name.to_uppercase()), value);
        }
        // There is nowhere else to say that this fails.
        let _ = self.0.send_to(&entry, SOCKET);
    }
}

fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    let value = &value.as_bytes()[..value.len().min(MAX_VALUE)];
    entry.extend(name.as_bytes());
    if value.contains(&b'\n') {
        entry.push(b'\n');
        entry.extend((value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend(value);
    entry.push(b'\n');
}

/// Of one event, in the order of its code.
#[derive(Default)]
struct Fields(Vec<(&'static str, String)>);

impl Fields {
    /// `web01: refused: provider 'main' is locked`: what it is about, the message, the error, and what else there is.
    fn line(&self) -> String {
        let (mut about, mut message, mut error, mut others) = (Vec::new(), "", None, Vec::new());
        for (name, value) in &self.0 {
            match *name {
                "message" => message = value,
                "error" => error = Some(value),
                "domain" | "path" => about.push((value, value.clone())),
                "vm" => about.push((value, format!("VM {value}"))),
                "provider" => about.push((value, format!("provider '{value}'"))),
                "envelope" => about.push((value, format!("envelope {value}"))),
                "job" => about.push((value, format!("job {value}"))),
                // The message says what was done.
                "op" => {}
                name => others.push(format!("{name} {value}")),
            }
        }
        let mut line = String::new();
        for (value, what) in about {
            let is_named = message.contains(value.as_str());
            let _ = if is_named {
                Ok(())
            } else {
                write!(line, "{what}: ")
            };
        }
        line.push_str(message);
        if let Some(error) = error {
            let _ = write!(line, ": {error}");
        }
        if !others.is_empty() {
            let _ = write!(line, " ({})", others.join(", "));
        }
        visible(&line).into_owned()
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push((field.name(), format!("{value:?}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(fields: &[(&'static str, &str)]) -> String {
        let fields = fields.iter().map(|(name, value)| (*name, (*value).to_owned()));
        Fields(fields.collect()).line()
    }

    #[test]
    fn a_line_names_what_it_is_about() {
        for (fields, said) in [
            (
                &[
                    ("domain", "web01"),
                    ("objects", "3"),
                    ("op", "prepare"),
                    ("message", "armed"),
                ][..],
                "web01: armed (objects 3)",
            ),
            (
                &[("provider", "main"), ("message", "unlocked by the TPM")],
                "provider 'main': unlocked by the TPM",
            ),
            (
                &[
                    ("domain", "web01"),
                    ("message", "web01 was to start with this host"),
                ],
                "web01 was to start with this host",
            ),
            (
                &[
                    ("error", "no file descriptors"),
                    ("message", "can't accept a connection"),
                ],
                "can't accept a connection: no file descriptors",
            ),
            (
                &[("vm", "7f\n"), ("provider", "main"), ("message", "x")],
                "VM 7f\\n: provider 'main': x",
            ),
        ] {
            assert_eq!(line(fields), said);
        }
    }

    #[test]
    fn a_value_of_several_lines_forges_no_field() {
        let mut entry = Vec::new();
        put(&mut entry, "F_DOMAIN", "a\nMESSAGE=b");
        put(&mut entry, "MESSAGE", "c");
        assert_eq!(entry, b"F_DOMAIN\n\x0b\0\0\0\0\0\0\0a\nMESSAGE=b\nMESSAGE=c\n");
    }
}
