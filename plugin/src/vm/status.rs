//! How a VM and its objects stand, as `virtseal status` shows them: what the keystore has ([`known`]), what is at the places that the
//! XML names ([`look`]), and what follows from both (`standing`, [`view`], `rivals`). Only [`look`] reads anything.

pub(crate) mod damaged;
pub(crate) mod hook;
pub(crate) mod known;
pub(crate) mod look;
mod rivals;
pub(crate) mod settings;
mod standing;
mod starts;
pub(crate) mod view;

pub(super) use rivals::in_image;
