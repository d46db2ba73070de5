//! The caller's floating-point mode: what of it a computation takes over, which is nothing.

use super::*;
use gpt2rs::session;

/// The caller's floating-point mode.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    Default,
    /// Flush-to-zero, denormals-are-zero, and rounding up.
    Hostile,
}

/// Runs `work` with the thread in that mode, in which it also starts threads.
#[cfg(target_arch = "x86_64")]
pub fn in_mode<R>(mode: Mode, work: impl FnOnce() -> R) -> R {
    /// Sets MXCSR, and sets it back to the default also after a panic.
    struct Mxcsr;
    impl Mxcsr {
        const DEFAULT: u32 = 0x1f80;
        fn set(value: u32) -> Mxcsr {
            // SAFETY: ldmxcsr reads the four bytes of a live u32; all exceptions stay masked.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
            Mxcsr
        }
        fn control() -> u32 {
            let mut value = 0u32;
            // SAFETY: stmxcsr writes the four bytes of a live u32.
            unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
            value & 0xffc0
        }
    }
    impl Drop for Mxcsr {
        fn drop(&mut self) {
            std::mem::forget(Mxcsr::set(Mxcsr::DEFAULT));
        }
    }
    let value = match mode {
        Mode::Default => Mxcsr::DEFAULT,
        Mode::Hostile => Mxcsr::DEFAULT | 0x8040 | 0x4000,
    };
    let _back = Mxcsr::set(value);
    let result = work();
    assert_eq!(Mxcsr::control(), value, "the caller's floating-point mode is not back");
    result
}

#[cfg(not(target_arch = "x86_64"))]
pub fn in_mode<R>(_mode: Mode, work: impl FnOnce() -> R) -> R {
    work()
}

/// Weights are drawn, read and rounded alike in any floating-point mode.
#[test]
fn a_model_made_in_another_mode_is_the_same() {
    let tokens = text(4, 40, 301);
    for types in USUAL {
        let logits = [Mode::Default, Mode::Hostile].map(|mode| {
            in_mode(mode, || {
                let options = types.options(fastest(), 2);
                let config = Config::from_json(ODD).unwrap();
                let model = Model::new(config, Origin::Random { seed: 7 }, options).unwrap();
                session::logits(&model, &tokens, GO_ON).unwrap()
            })
        });
        assert_bits(&logits[1], &logits[0], &format!("{types:?} made and run in a hostile mode"));
    }
}
