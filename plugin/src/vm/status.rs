//! How a VM and its objects stand, as `virtseal status` shows them: what the keystore has ([`known`]), what is at the places that the
//! XML names ([`look`]), and what follows from both (`standing`, [`view`], `rivals`). Only [`look`] reads anything.

pub mod damaged;
pub mod known;
pub mod look;
mod rivals;
pub mod settings;
mod standing;
pub mod view;
