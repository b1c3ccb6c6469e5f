//! A refusal of a provider, as its user is told of it.

use crate::model::problem::{Problem, chain};
use crate::provider::ProviderError;
use crate::recipients::Provider;

pub(super) fn refused(known: &Provider, error: &ProviderError) -> Problem {
    let name = known.provider().name();
    let (code, next) = error.advice(name, known.row());
    Problem::new(code, format!("provider '{name}' {}", chain(error))).advised(next)
}
