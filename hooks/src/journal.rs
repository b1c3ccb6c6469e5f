//! A warning in systemd's journal (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): libvirt drops the stderr of a hook that lets a
//! VM start.

use std::os::unix::net::UnixDatagram;

use crate::terminal::one_line;

const SOCKET: &str = "/run/systemd/journal/socket";

/// Waits for nothing, and where nobody listens the warning is lost: virtseald has been told too.
pub(crate) fn warn(message: &str) {
    let entry = format!(
        "PRIORITY=4\nSYSLOG_IDENTIFIER=virtseal-hook\nMESSAGE={}\n",
        one_line(message)
    );
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket
            .set_nonblocking(true)
            .and_then(|()| socket.send_to(entry.as_bytes(), SOCKET));
    }
}
