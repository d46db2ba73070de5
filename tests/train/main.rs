//! Training against float64, and against itself: losses and gradients are the same bits however they are computed.

use gpt2rs::simd::Isa;
use gpt2rs::train::{Batch, Kind, Options, Pass, Trainer};

mod bits;
#[path = "../cases/mod.rs"]
mod cases;
mod golden;
mod model;
#[path = "../npz/mod.rs"]
mod npz;

const GO_ON: &dyn Fn() -> bool = &|| true;

fn fastest() -> Isa {
    *Isa::available().last().unwrap()
}
