//! What virtseal talks about, without I/O.

pub(crate) mod act;
pub(crate) mod advice;
pub(crate) mod backoff;
pub(crate) mod cache_policy;
pub(crate) mod deadlines;
pub(crate) mod digest;
pub(crate) mod envelope;
pub(crate) mod finding;
pub(crate) mod image_format;
pub(crate) mod job;
pub(crate) mod kek;
pub(crate) mod nearest;
pub(crate) mod problem;
pub(crate) mod subject;

/// What serde's `try_from` and `into` of a `String` need of a type that `Display` writes and `FromStr` reads.
macro_rules! stored_as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = <Self as std::str::FromStr>::Err;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}
pub(crate) use stored_as_text;
