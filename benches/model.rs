//! Whole-model figures on random weights of 124M, beside the limits of this machine in the same run.
use gpt2rs::config::Config;
use gpt2rs::model::{Model, Options, Run, Wanted};
use gpt2rs::probe::{Bandwidth, fma_peak};
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};
use std::time::Instant;

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn main() {
    let isa = Isa::from_env().unwrap();
    for n_threads in std::env::var("THREADS")
        .map_or(vec![1, 2], |v| v.split(",").map(|v| v.parse().unwrap()).collect::<Vec<usize>>())
    {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let t = Instant::now();
            let options = Options { dtype, n_threads: Some(n_threads), ..Options::default() };
            let model =
                Model::new(Config::preset("gpt2").unwrap(), Origin::Random { seed: 1 }, options).unwrap();
            let loaded = t.elapsed().as_secs_f64();
            let mut bandwidth = Bandwidth::new(isa, n_threads).unwrap();
            let v = model.config().n_vocab;
            let mut out = vec![0.0; 8 * v];
            let mut bw = vec![];
            let mut peak = vec![];
            let mut rates = [vec![], vec![], vec![], vec![], vec![]];
            for _ in 0..std::env::var("REPS").map_or(5, |v| v.parse().unwrap()) {
                bw.push((0..3).map(|_| bandwidth.measure()).fold(0.0, f64::max));
                peak.push(fma_peak(isa, n_threads).unwrap());
                for (which, prompt) in [(0, 32usize), (1, 896)] {
                    let mut cache = model.new_cache();
                    let ids: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 50000).collect();
                    for ids in ids.chunks(512) {
                        model
                            .forward(
                                &mut [Run { tokens: ids, cache: &mut cache, wanted: true }],
                                Wanted::Last(&mut out[..v]),
                                &|| true,
                            )
                            .unwrap();
                    }
                    let t = Instant::now();
                    for i in 0..64 {
                        model
                            .forward(
                                &mut [Run { tokens: &[i * 11], cache: &mut cache, wanted: true }],
                                Wanted::Last(&mut out[..v]),
                                &|| true,
                            )
                            .unwrap();
                    }
                    rates[which].push(64.0 / t.elapsed().as_secs_f64());
                }
                for (which, prompt) in [(2, 512usize), (3, 1000)] {
                    let mut cache = model.new_cache();
                    let ids: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 50000).collect();
                    let t = Instant::now();
                    for ids in ids.chunks(prompt.div_ceil(prompt.div_ceil(512))) {
                        model
                            .forward(
                                &mut [Run { tokens: ids, cache: &mut cache, wanted: true }],
                                Wanted::Last(&mut out[..v]),
                                &|| true,
                            )
                            .unwrap();
                    }
                    rates[which].push(prompt as f64 / t.elapsed().as_secs_f64());
                }
                let mut caches: Vec<_> = (0..8).map(|_| model.new_cache()).collect();
                let ids: Vec<u32> = (0..32).collect();
                for cache in &mut caches {
                    model
                        .forward(
                            &mut [Run { tokens: &ids, cache, wanted: true }],
                            Wanted::Last(&mut out[..v]),
                            &|| true,
                        )
                        .unwrap();
                }
                let t = Instant::now();
                for _ in 0..32 {
                    let mut runs: Vec<Run> =
                        caches.iter_mut().map(|cache| Run { tokens: &[5], cache, wanted: true }).collect();
                    model.forward(&mut runs, Wanted::Last(&mut out), &|| true).unwrap();
                }
                rates[4].push(8.0 * 32.0 / t.elapsed().as_secs_f64());
            }
            let bytes = model.weights().bytes() as f64;
            let [d32, d896, p512, p1000, b8] = rates.map(median);
            let (bw, peak) = (median(bw), median(peak));
            let flops = |t: f64| {
                2.0 * t * 84.9e6 + 12.0 * 2.0 * 2.0 * 768.0 * t * (t + 1.0) / 2.0 + 2.0 * 768.0 * 50257.0
            };
            println!(
                "{} {dtype:?} x{n_threads}: load {loaded:.2}s bw {:.1} GB/s peak {:.0} GF/s | decode32 {d32:.1} tok/s {:.1}% | decode896 {:.1} ({:.0}%) | p512 {p512:.0} tok/s {:.1}% | p1000 {p1000:.0} {:.1}% | b8 {b8:.0} x{:.2}",
                isa.name(),
                bw / 1e9,
                peak / 1e9,
                d32 * bytes / bw * 100.0,
                d896,
                d896 / d32 * 100.0,
                flops(512.0) * p512 / 512.0 / peak * 100.0,
                flops(1000.0) * p1000 / 1000.0 / peak * 100.0,
                b8 / d32
            );
        }
    }
}
