//! What the objects are that a TPM is asked to make or to load.

use tss_esapi::Error;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::structures::{
    Digest, EccPoint, HashScheme, KeyedHashScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyRsa, PublicKeyedHashParameters, PublicRsaParametersBuilder, RsaExponent, RsaScheme,
    SymmetricDefinitionObject,
};

use super::signed::SigningKey;

/// A NIST P-256 storage key with AES-128-CFB: the template of the TCG's EK Credential Profile, appendix B.4, with empty
/// policy and unique field, as tpm2-tools and systemd have it. The same seed always yields the same key.
pub(super) fn storage_key_template() -> Result<Public, Error> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_decrypt(true)
        .build()?;
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(
        SymmetricDefinitionObject::AES_128_CFB,
        EccCurve::NistP256,
    )
    .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// The public half of a key that signs PCR policies: its name is part of a policy, so this must not change.
pub(super) fn signing_key_template(key: &SigningKey) -> Result<Public, Error> {
    let modulus = key.modulus();
    let bits = u16::try_from(modulus.len() * 8).unwrap_or(u16::MAX);
    let attributes = ObjectAttributesBuilder::new()
        .with_user_with_auth(true)
        .with_sign_encrypt(true)
        .build()?;
    let scheme = RsaScheme::RsaSsa(HashScheme::new(HashingAlgorithm::Sha256));
    let parameters = PublicRsaParametersBuilder::new_unrestricted_signing_key(
        scheme,
        RsaKeyBits::try_from(bits)?,
        RsaExponent::ZERO_EXPONENT,
    )
    .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Rsa)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_rsa_parameters(parameters)
        .with_rsa_unique_identifier(PublicKeyRsa::try_from(modulus)?)
        .build()
}

/// Whether there is a PIN that somebody may guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guesses {
    NoneToMake,
    /// The TPM counts wrong ones, and locks itself after some.
    Count,
}

/// Only the policy opens it.
pub(super) fn sealed_object(policy: Digest, guesses: Guesses) -> Result<Public, Error> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_admin_with_policy(true)
        .with_no_da(guesses == Guesses::NoneToMake)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_auth_policy(policy)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(Digest::default())
        .build()
}
