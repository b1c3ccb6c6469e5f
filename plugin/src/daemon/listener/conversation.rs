//! One connection from its first call to its end.
//!
//! The service, its types and its errors are zlink's; the messages are read and written here. zlink's own server takes
//! descriptors and 100 MB from anybody, and serializes a reply anew for every 256 bytes of it.

use futures_util::StreamExt;
use serde::Serialize;
use zlink::connection::{PassedCredentials, socket};
use zlink::service::MethodReply;
use zlink::{Call, Connection, Reply};

use super::channel::{Channel, Fault};
use super::understood::{Unknown, unknown};
use crate::api::{HostError, of_another_version};
use crate::daemon::service::Service;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::terminal::visible;

pub(super) type MethodCall<'de> = <Service as zlink::Service<Unused>>::MethodCall<'de>;

/// Answers calls until the other end has no more.
pub(super) async fn converse(channel: &mut Channel, service: &mut Service) -> Result<(), Fault> {
    let mut unused = Connection::new(Unused);
    while let Some(message) = channel.message().await? {
        if let Some((unknown, waits)) = unknown(&message.bytes) {
            if waits {
                channel.send(&failure(not_understood(&unknown))?).await?;
            }
            continue;
        }
        let call: Call<MethodCall<'_>> = serde_json::from_slice(&message.bytes).map_err(Fault::NotACall)?;
        let (reply, _) = zlink::Service::handle(service, &call, &mut unused, message.descriptors).await;
        match reply {
            MethodReply::Single(_) | MethodReply::Error(_) if call.oneway() => {}
            MethodReply::Single(parameters) => {
                let reply = Reply::new(parameters).set_continues(Some(false));
                let bytes = bounded(encoded(&reply)?, channel.max_reply())?;
                channel.send(&bytes).await?;
            }
            MethodReply::Error(error) => channel.send(&encoded(&error)?).await?,
            MethodReply::Multi(mut replies) => {
                while let Some((reply, _)) = replies.next().await {
                    let bytes = match &reply {
                        Ok(reply) => bounded(encoded(reply)?, channel.max_reply())?,
                        Err(error) => encoded(error)?,
                    };
                    channel.send(&bytes).await?;
                }
            }
            // No method here can be upgraded.
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// Says why to the first call, and nothing else.
pub(super) async fn refuse(channel: &mut Channel, failure: Problem) -> Result<(), Fault> {
    channel.message().await?;
    channel.send(&self::failure(failure)?).await
}

/// Says why the connection ends, where its other end is to blame and may be listening.
pub(super) async fn explain(channel: &mut Channel, fault: &Fault) {
    if let Some(Ok(bytes)) = blamed(fault).map(failure) {
        // It may be gone.
        let _ = channel.send(&bytes).await;
    }
}

fn blamed(fault: &Fault) -> Option<Problem> {
    Some(match fault {
        Fault::Io(_) | Fault::Unread | Fault::Idle(_) => return None,
        // What comes with them, root alone may ask for.
        Fault::Descriptors => Problem::denied("only root may do this").next(Advice::RunAsRoot),
        // What serde says of it names no field.
        Fault::NotACall(_) => {
            let what = "this virtseald can't read the call, and has done nothing";
            of_another_version(Code::Usage, what)
        }
        Fault::TooLong(_) | Fault::TooManyDescriptors => {
            Problem::usage(format!("virtseald ends the connection: {}", chain(fault)))
                .next("use the virtseal of the same version as virtseald")
        }
    })
}

fn not_understood(unknown: &Unknown) -> Problem {
    let what = match unknown {
        Unknown::Field(field) => format!("'{}'", visible(field)),
        Unknown::Word { field, word, known } => {
            format!("'{}' for {field}, only {}", visible(word), known.join(", "))
        }
    };
    let what = format!("this virtseald does not know {what}, and has done nothing");
    of_another_version(Code::Usage, what)
}

/// The message that says so.
pub(super) fn failure(failure: Problem) -> Result<Vec<u8>, Fault> {
    encoded(&HostError::from(failure))
}

fn encoded(message: &impl Serialize) -> Result<Vec<u8>, Fault> {
    let mut bytes = serde_json::to_vec(message).map_err(Fault::NotACall)?;
    bytes.push(0);
    Ok(bytes)
}

/// Lists come in pages, so what is longer is one thing that is huge.
fn bounded(reply: Vec<u8>, max: usize) -> Result<Vec<u8>, Fault> {
    if reply.len() <= max {
        return Ok(reply);
    }
    let why = format!(
        "the answer has {} bytes, and others than root get {max}",
        reply.len()
    );
    failure(Problem::denied(why).next(Advice::RunAsRoot))
}

/// What a service is told that it is connected to; ours does not look.
#[derive(Debug)]
pub(super) struct Unused;

impl socket::Socket for Unused {
    type ReadHalf = Self;
    type WriteHalf = Self;

    fn split(self) -> (Self, Self) {
        (Self, Self)
    }
}

impl socket::ReadHalf for Unused {
    async fn read(&mut self, _buffer: &mut [u8]) -> zlink::Result<socket::ReadResult> {
        Err(zlink::Error::UnexpectedEof)
    }
}

impl socket::WriteHalf for Unused {
    async fn write(
        &mut self,
        _buffer: &[u8],
        _fds: &[impl std::os::fd::AsFd],
        _credentials: Option<&PassedCredentials>,
    ) -> zlink::Result<()> {
        Err(zlink::Error::UnexpectedEof)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_of_another_version_is_told_so() {
        let lacks = r#"{"method":"io.virtseal.Host.UnsealVm","parameters":{"vm":"web01"}}"#;
        let call: Result<Call<MethodCall<'_>>, _> = serde_json::from_str(lacks);
        let told = blamed(&Fault::NotACall(call.unwrap_err())).unwrap();
        assert_eq!(
            told.to_string(),
            "virtseal and virtseald are of different versions: this virtseald can't read the call, and has done nothing. Next: systemctl \
             restart virtseald, if it was upgraded, or use the virtseal of the same version"
        );
    }

    #[test]
    fn what_is_too_long_for_a_reader_becomes_a_reason() {
        assert_eq!(bounded(vec![1; 10], 10).unwrap(), [1; 10]);
        let told = bounded(vec![1; 70_000], 65_536).unwrap();
        let told = String::from_utf8(told).unwrap();
        assert!(
            told.len() < 1000 && told.contains("70000 bytes") && told.contains("sudo"),
            "{told}"
        );
    }
}
