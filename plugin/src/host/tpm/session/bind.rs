//! Binding something to the TPM, and opening it by the policy that it was bound with.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;

use tss_esapi::constants::response_code::Tss2ResponseCodeKind as Kind;
use tss_esapi::handles::{KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    self, Auth, Digest, Name, Nonce, Private, Public, PublicKeyRsa, RsaSignature, SensitiveData,
    VerifiedTicket,
};
use tss_esapi::traits::{Marshall, UnMarshall};

use super::{Encrypts, Session};
use crate::host::tpm::TpmError;
use crate::host::tpm::bound::{BoundToTpm, Hex, Parent};
use crate::host::tpm::digest::PolicyDigest;
use crate::host::tpm::pcr_list::PcrList;
use crate::host::tpm::policy::{BindPolicy, PinSalt};
use crate::host::tpm::signed::{Signature, Signatures};
use crate::host::tpm::template::{Guesses, sealed_object};
use crate::host::tpm::tss_error::{failed, kind};
use crate::secret::SecretBytes;

/// A signature that the TPM has verified.
struct Approval {
    signature: Signature,
    key: Name,
    ticket: VerifiedTicket,
}

impl Session {
    pub(in crate::host::tpm) fn bind(
        &mut self,
        secret: &SecretBytes,
        policy: &BindPolicy,
    ) -> Result<BoundToTpm, TpmError> {
        let values = self.pcr_values(&policy.exact())?;
        let digest = self.policy_digest(policy, &values)?;
        let salt = policy.pin().map(|_| PinSalt::random()).transpose();
        let salt = salt.map_err(|error| deriving(error.into()))?;
        let pin = salt.as_ref().zip(policy.pin());
        let auth = pin.map(|(salt, pin)| auth(salt, pin)).transpose()?;
        let (parent, key) = self.storage_key()?;
        let encrypted = self.encrypted_session(key, Encrypts::CommandAndAnswer)?;
        let data = SensitiveData::try_from(secret.expose()).map_err(failed("handing over what to seal"))?;
        let guesses = match auth {
            Some(_) => Guesses::Count,
            None => Guesses::NoneToMake,
        };
        let template = sealed_object(digest, guesses).map_err(failed("describing what to seal"))?;
        let created = self
            .context
            .execute_with_session(Some(encrypted), |context| {
                context.create(key, template, auth, Some(data), None, None)
            })
            .map_err(failed("sealing"))?;
        let of_pcrs_alone = policy.signed_by().is_none() && salt.is_none();
        Ok(BoundToTpm {
            version: if of_pcrs_alone {
                BoundToTpm::FIRST_VERSION
            } else {
                BoundToTpm::VERSION
            },
            signed_by: policy.signed_by().map(|key| Hex(key.to_der())),
            pin_salt: salt.map(|salt| Hex(salt.0)),
            parent,
            parent_name: self.name(key)?,
            pcrs: values
                .into_iter()
                .map(|(pcr, value)| (pcr, hex::encode(value)))
                .collect(),
            public: created
                .out_public
                .marshall()
                .map_err(failed("reading what was sealed"))?,
            private: created.out_private.value().to_vec(),
        })
    }

    /// `pin` is there if `bound` needs one.
    pub(in crate::host::tpm) fn open_bound(
        &mut self,
        bound: &BoundToTpm,
        pin: Option<&SecretBytes>,
        signatures: &Signatures,
    ) -> Result<SecretBytes, TpmError> {
        let key = match bound.parent {
            Parent::Persistent => self.persistent()?.ok_or(TpmError::AnotherTpm)?,
            Parent::FromSeed => self.derived()?,
        };
        if self.name(key)? != bound.parent_name {
            return Err(TpmError::AnotherTpm);
        }
        let approval = self.approval(bound, signatures)?;
        let loaded = self.load(key, bound)?;
        let policy = self.policy_session(key)?;
        self.satisfy(policy, bound, approval)?;
        if let Some((Hex(salt), pin)) = bound.pin_salt.as_ref().zip(pin) {
            let auth = auth(&PinSalt(salt.clone()), pin)?;
            self.context
                .tr_set_auth(loaded.into(), auth)
                .map_err(failed("handing over the PIN"))?;
        }
        let encrypted = self.encrypted_session(key, Encrypts::Answer)?;
        let sessions = (Some(AuthSession::from(policy)), Some(encrypted), None);
        let unsealed = self
            .context
            .execute_with_sessions(sessions, |context| context.unseal(loaded.into()));
        match unsealed {
            Ok(data) => SecretBytes::copy_of(data.value()).map_err(TpmError::Host),
            Err(error) if kind(error) == Some(Kind::PolicyFail) => Err(self.difference(bound)?),
            Err(error) if matches!(kind(error), Some(Kind::AuthFail | Kind::BadAuth)) => {
                Err(TpmError::WrongPin { left: None })
            }
            Err(error) => Err(failed("unsealing")(error)),
        }
    }

    fn load(&mut self, key: KeyHandle, bound: &BoundToTpm) -> Result<KeyHandle, TpmError> {
        let public = Public::unmarshall(&bound.public).map_err(|_| TpmError::Damaged)?;
        let private = Private::try_from(&bound.private[..]).map_err(|_| TpmError::Damaged)?;
        let encrypted = self.encrypted_session(key, Encrypts::CommandAndAnswer)?;
        let loaded = self
            .context
            .execute_with_session(Some(encrypted), |context| context.load(key, private, public));
        // Many a TPM has room for three sessions, and two are to come.
        self.context
            .flush_context(SessionHandle::from(encrypted).into())
            .map_err(failed("ending a session"))?;
        loaded.map_err(|error| match kind(error) {
            // The storage key is the one that it was sealed under.
            Some(
                Kind::Integrity
                | Kind::Size
                | Kind::Value
                | Kind::Type
                | Kind::Attributes
                | Kind::Hash
                | Kind::Scheme
                | Kind::Insufficient
                | Kind::Binding
                | Kind::Sensitive,
            ) => TpmError::Damaged,
            _ => failed("loading what was sealed")(error),
        })
    }

    /// The digest of the policy that wants `values`, and what else `policy` asks for.
    fn policy_digest(
        &mut self,
        policy: &BindPolicy,
        values: &BTreeMap<u8, Vec<u8>>,
    ) -> Result<Digest, TpmError> {
        let mut digest = PolicyDigest::EMPTY;
        if let Some(key) = policy.signed_by() {
            let loaded = self.load_signing_key(key)?;
            digest = PolicyDigest::authorized_by(&self.name(loaded)?);
            self.flush(loaded)?;
        }
        if !values.is_empty() {
            digest = digest.pcrs(values);
        }
        if policy.pin().is_some() {
            digest = digest.auth_value();
        }
        Digest::try_from(&digest.0[..]).map_err(failed("making the policy"))
    }

    /// In the order of [`Session::policy_digest`].
    fn satisfy(
        &mut self,
        session: PolicySession,
        bound: &BoundToTpm,
        approval: Option<Approval>,
    ) -> Result<(), TpmError> {
        if let Some(approval) = approval {
            self.policy_pcr(session, &PcrList(approval.signature.pcrs))?;
            let policy = approval.signature.policy.0;
            let policy = Digest::try_from(&policy[..]).map_err(failed("making the policy"))?;
            self.context
                .execute_without_session(|context| {
                    let nonce = Nonce::default();
                    context.policy_authorize(session, policy, nonce, &approval.key, approval.ticket)
                })
                .map_err(failed("showing what was signed"))?;
        }
        let exact = bound.exact();
        if !exact.0.is_empty() {
            self.policy_pcr(session, &exact)?;
        }
        if bound.needs_pin() {
            self.context
                .execute_without_session(|context| context.policy_auth_value(session))
                .map_err(failed("making the policy"))?;
        }
        Ok(())
    }

    /// The signature that covers what PCR 11 is now, verified by the TPM; `None` if none is asked for.
    fn approval(
        &mut self,
        bound: &BoundToTpm,
        signatures: &Signatures,
    ) -> Result<Option<Approval>, TpmError> {
        let Some(key) = bound.signing_key().map_err(|_| TpmError::Damaged)? else {
            return Ok(None);
        };
        let values = self.pcr_values(&PcrList(signatures.pcrs()))?;
        let not_signed = |why| TpmError::NotSigned {
            key: key.fingerprint(),
            why,
        };
        let signature = signatures.find(&key, &values).map_err(not_signed)?;
        let loaded = self.load_signing_key(&key)?;
        let name = self.context.tr_get_name(loaded.into());
        let name = name.map_err(failed("naming the signing key"))?;
        let ticket = self.verified(loaded, signature)?;
        self.flush(loaded)?;
        Ok(Some(Approval {
            signature: signature.clone(),
            key: name,
            ticket,
        }))
    }

    fn verified(&mut self, key: KeyHandle, signature: &Signature) -> Result<VerifiedTicket, TpmError> {
        const DOING: &str = "verifying what was signed";
        let digest = openssl::sha::sha256(&signature.policy.0);
        let digest = Digest::try_from(&digest[..]).map_err(failed(DOING))?;
        let bytes = PublicKeyRsa::try_from(&signature.bytes[..]).map_err(failed(DOING))?;
        let bytes = RsaSignature::create(HashingAlgorithm::Sha256, bytes).map_err(failed(DOING))?;
        self.context
            .execute_without_session(|context| {
                context.verify_signature(key, digest, structures::Signature::RsaSsa(bytes))
            })
            .map_err(failed(DOING))
    }

    /// Which PCRs made the policy fail.
    fn difference(&mut self, bound: &BoundToTpm) -> Result<TpmError, TpmError> {
        let now = self.pcr_values(&bound.exact())?;
        let differs = |(pcr, value): (&u8, &String)| (hex::encode(&now[pcr]) != *value).then_some(*pcr);
        let differing: BTreeSet<u8> = bound.pcrs.iter().filter_map(differs).collect();
        if differing.is_empty() {
            // What is noted of the PCRs is not what the policy has.
            Ok(TpmError::Damaged)
        } else {
            Ok(TpmError::PcrsDiffer(PcrList(differing)))
        }
    }
}

/// A PIN as the TPM gets it.
fn auth(salt: &PinSalt, pin: &SecretBytes) -> Result<Auth, TpmError> {
    let value = salt.auth_value(pin).map_err(|error| deriving(error.into()))?;
    Auth::try_from(value.expose()).map_err(failed("handing over the PIN"))
}

fn deriving(source: Box<dyn StdError + Send + Sync>) -> TpmError {
    TpmError::Failed {
        doing: "deriving a key from the PIN",
        source,
    }
}
