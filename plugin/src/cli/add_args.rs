//! What the kinds of `virtseal provider add` have in common.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::model::cache_policy::CachePolicy;
use crate::model::problem::Problem;
use crate::provider::ScopeSetting;
use crate::provider::kind::Kind;

/// For kinds without a cache, so that who asks for one learns why there is none.
#[derive(Debug, Args)]
pub(super) struct NoCacheArgs {
    #[arg(long, value_name = "POLICY", hide = true)]
    cache: Option<CachePolicy>,
}

impl NoCacheArgs {
    pub(super) fn refuse(&self, kind: &str) -> Result<(), Problem> {
        match (
            self.cache,
            Kind::named(kind).and_then(|kind| kind.nothing_to_cache),
        ) {
            (Some(CachePolicy::For(_) | CachePolicy::UntilLock), Some(why)) => {
                Err(Problem::usage(why.to_string()).next("the same command without --cache"))
            }
            _ => Ok(()),
        }
    }
}

/// Parses whom KEKs serve.
pub(super) fn kek_scope() -> impl TypedValueParser<Value = ScopeSetting> {
    PossibleValuesParser::new(["vm", "provider"]).map(|word| match word.as_str() {
        "provider" => ScopeSetting::Provider,
        _ => ScopeSetting::Vm,
    })
}
