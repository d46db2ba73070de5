//! Which instruction sets there are, and that none is skipped or stood in for.

use gpt2rs::error::Error;
use gpt2rs::simd::Isa;

fn names() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

#[test]
fn portable_is_everywhere_and_the_fastest_comes_last() {
    let places: Vec<usize> =
        names().iter().map(|name| Isa::NAMES.iter().position(|known| known == name).unwrap()).collect();
    assert_eq!(places[0], 0);
    assert!(places.is_sorted_by(|a, b| a < b), "{:?}", names());
}

/// A set that the processor has but the list lacks would leave its kernels untested.
#[cfg(target_arch = "x86_64")]
#[test]
fn what_the_processor_has_is_in_the_list() {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let avx512vnni = avx512 && is_x86_feature_detected!("avx512vnni");
    let expected = [
        ("portable", true),
        ("avx2", avx2),
        ("avxvnni", avx2 && is_x86_feature_detected!("avxvnni")),
        ("avx512", avx512),
        ("avx512vnni", avx512vnni),
        ("avx512bf16", avx512vnni && is_x86_feature_detected!("avx512bf16")),
    ];
    assert_eq!(expected.map(|(name, _)| name), Isa::NAMES);
    for (name, there) in expected {
        assert_eq!(names().contains(&name), there, "{name}");
    }
}

#[test]
fn a_forced_set_is_that_set_or_an_error() {
    for name in Isa::NAMES {
        match Isa::named(name) {
            Ok(isa) => assert_eq!((isa.name(), names().contains(&name)), (name, true)),
            Err(Error::MissingIsa(missing)) => {
                assert_eq!((missing, names().contains(&name)), (name, false));
                assert!(Error::MissingIsa(missing).to_string().contains(name));
            }
            Err(other) => panic!("{name}: {other}"),
        }
    }
    for name in ["", "AVX2", "sse2", "avx512 "] {
        match Isa::named(name) {
            Err(Error::UnknownIsa(unknown)) => assert_eq!(unknown, name),
            Err(other) => panic!("{name:?}: {other}"),
            Ok(isa) => panic!("{name:?} is taken for {}", isa.name()),
        }
    }
}
