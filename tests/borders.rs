//! The borders of the crate, read from its source: which module may name which, where `unsafe` may stand, and which
//! file names are refused. The table here is the one of `docs/design.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What a module may name with `crate::`, each one only modules above it. `error` may be named by all, a module may
/// always name itself.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("simd", &[]),
    ("pool", &[]),
    ("mapped", &[]),
    ("philox", &[]),
    ("config", &[]),
    ("checkpoint", &[]),
    ("ops", &["simd", "pool", "mapped", "philox", "config"]),
    ("kv_cache", &["mapped", "config", "ops"]),
    ("packed", &["mapped", "config", "checkpoint", "ops"]),
    ("weights", &["simd", "pool", "mapped", "philox", "config", "checkpoint", "ops", "packed"]),
    ("save", &["config", "checkpoint", "packed", "weights"]),
    ("parallel", &["simd", "pool", "config", "ops", "kv_cache", "weights"]),
    ("model", &["simd", "pool", "config", "ops", "kv_cache", "weights", "parallel"]),
    ("sample", &["simd", "philox", "ops"]),
    ("session", &["simd", "kv_cache", "model", "sample"]),
    ("speculate", &["simd", "model", "sample", "session"]),
    ("train", &["simd", "pool", "mapped", "config", "checkpoint", "ops", "weights"]),
    ("probe", &["simd", "pool", "mapped"]),
];

/// The files that may say `unsafe`.
const MAY_SAY_UNSAFE: &[&str] = &["simd/", "simd.rs", "pool.rs", "mapped.rs", "python/"];

/// Names that say nothing about what is in a file.
const SAY_NOTHING: &[&str] = &["utils", "util", "helpers", "helper", "common", "manager", "misc"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder` whose name passes `wanted`, hidden folders and build outputs aside.
fn files(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with('.') || name == "target" || name == "__pycache__" {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path, wanted));
        } else if wanted(&name) {
            found.push(path);
        }
    }
    found
}

/// (path below src, text) of each Rust file of the crate.
fn sources() -> Vec<(String, String)> {
    let src = root().join("src");
    let mut all: Vec<(String, String)> = files(&src, &|name| name.ends_with(".rs"))
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("UTF-8 source");
            let below = path.strip_prefix(&src).unwrap();
            (below.to_string_lossy().replace('\\', "/"), text)
        })
        .collect();
    all.sort();
    all
}

/// The text without comments, string and character literals, each replaced by a space; lines stay where they are.
fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    // Blanks bytes[i..end], newlines kept.
    fn blank(out: &mut Vec<u8>, skipped: &[u8]) {
        out.push(b' ');
        out.extend(skipped.iter().filter(|&&b| b == b'\n'));
    }
    while i < bytes.len() {
        let rest = &bytes[i..];
        let after_word = i > 0 && (bytes[i - 1].is_ascii_alphanumeric() || bytes[i - 1] == b'_');
        let end = if rest.starts_with(b"//") {
            rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            let mut depth = 0;
            let mut j = 0;
            loop {
                if rest[j..].starts_with(b"/*") {
                    depth += 1;
                    j += 2;
                } else if rest[j..].starts_with(b"*/") {
                    depth -= 1;
                    j += 2;
                } else {
                    j += 1;
                }
                if depth == 0 || j >= rest.len() {
                    break j.min(rest.len());
                }
            }
        } else if rest[0] == b'"' {
            string_end(rest)
        } else if rest[0] == b'r' && !after_word && raw_string_end(rest).is_some() {
            raw_string_end(rest).unwrap()
        } else if rest[0] == b'\'' {
            char_end(rest)
        } else {
            0
        };
        if end == 0 {
            out.push(bytes[i]);
            i += 1;
        } else {
            blank(&mut out, &rest[..end]);
            i += end;
        }
    }
    String::from_utf8(out).expect("whole literals were taken out")
}

/// Length of the string literal that `rest` starts with.
fn string_end(rest: &[u8]) -> usize {
    let mut j = 1;
    while j < rest.len() && rest[j] != b'"' {
        j += if rest[j] == b'\\' { 2 } else { 1 };
    }
    (j + 1).min(rest.len())
}

/// Length of the raw string literal that `rest` starts with, if it is one.
fn raw_string_end(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|&&b| b == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return None;
    }
    let close = [&b"\""[..], &vec![b'#'; hashes]].concat();
    let body = &rest[2 + hashes..];
    let at = body.windows(close.len()).position(|w| w == close)?;
    Some(2 + hashes + at + close.len())
}

/// Length of the character literal that `rest` starts with, or 0 for a lifetime.
fn char_end(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        return rest[3..].iter().position(|&b| b == b'\'').map_or(0, |j| j + 4);
    }
    let body = std::str::from_utf8(&rest[1..rest.len().min(5)])
        .or_else(|e| std::str::from_utf8(&rest[1..1 + e.valid_up_to()]));
    let first = body.ok().and_then(|s| s.chars().next()).map_or(1, char::len_utf8);
    if rest.get(1 + first) == Some(&b'\'') { first + 2 } else { 0 }
}

/// The code without its test modules (`#[cfg(test)] mod NAME { ... }` at the left margin): tests may name what they like.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut lines = code.lines().peekable();
    while let Some(line) = lines.next() {
        let opens_tests = line == "#[cfg(test)]"
            && lines.peek().is_some_and(|next| next.starts_with("mod ") && next.trim_end().ends_with('{'));
        if opens_tests {
            lines.by_ref().find(|line| line.trim_end() == "}");
        } else {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The first names that follow each `prefix` in the code: `crate::a::b` and `crate::{a::b, c}` give a and c.
fn named_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].chars().next_back().is_some_and(|c| is_word(c) || c == ':' || c == '$') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(rest.chars().take_while(|&c| is_word(c)).collect());
            continue;
        };
        let (mut depth, mut item_starts) = (0, true);
        let mut word = String::new();
        for c in group.chars() {
            if depth == 0 && item_starts && is_word(c) {
                word.push(c);
                continue;
            }
            if !word.is_empty() {
                names.insert(std::mem::take(&mut word));
                item_starts = false;
            }
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => item_starts = true,
                _ => {}
            }
        }
    }
    names
}

/// What lib.rs re-exports: item -> the module it comes from.
fn re_exports(lib: &str) -> BTreeMap<String, String> {
    let mut from = BTreeMap::new();
    for statement in lib.split(';') {
        let Some(at) = statement.find("pub use ") else {
            continue;
        };
        let path: String = statement[at + "pub use ".len()..].split_whitespace().collect();
        let module: String = path.chars().take_while(|&c| is_word(c)).collect();
        for item in path.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()) {
            from.insert(item.to_owned(), module.clone());
        }
    }
    from
}

/// `ops/matmul.rs` belongs to the module `ops`, `model.rs` to `model`.
fn module_of(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn modules_name_only_what_the_table_allows() {
    let sources = sources();
    let table: BTreeMap<&str, &[&str]> = MAY_NAME.iter().copied().collect();
    let lib = &sources.iter().find(|(file, _)| file == "lib.rs").expect("src/lib.rs").1;
    let exported = re_exports(&code(lib));
    let mut wrong = Vec::new();
    for (file, text) in &sources {
        let module = module_of(file);
        // lib.rs says what is public, python/ wraps it: both stand above the table.
        if module == "lib" || module == "python" {
            continue;
        }
        let Some(allowed) = table.get(module) else {
            wrong.push(format!("src/{file}: the module {module} is not in the table"));
            continue;
        };
        let code = without_tests(&code(text));
        for name in named_after(&code, "crate::") {
            let target = exported.get(&name).unwrap_or(&name).as_str();
            if target != module && target != "error" && !allowed.contains(&target) {
                wrong
                    .push(format!("src/{file} names crate::{name}; {module} may name {allowed:?} and error"));
            }
        }
        // At the left margin of a top-level file, and twice in a row below it, `super` leaves the module unseen.
        let top_level = !file.contains('/');
        if code
            .lines()
            .any(|line| (top_level && line.starts_with("use super::")) || line.contains("super::super::"))
        {
            wrong.push(format!("src/{file} leaves its module through super::, where crate:: shows it"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_is_in_layers() {
    let mut above: BTreeSet<&str> = BTreeSet::new();
    for (module, may_name) in MAY_NAME {
        for name in *may_name {
            assert!(above.contains(name), "{module} may name {name}, which is not above it");
        }
        assert!(above.insert(module), "{module} is in the table twice");
    }
}

#[test]
fn only_the_python_folder_names_pyo3_and_numpy() {
    for (file, text) in sources() {
        if !file.starts_with("python/") {
            let code = code(&text);
            for extern_crate in ["pyo3::", "numpy::"] {
                let found = code.match_indices(extern_crate).any(|(at, _)| !code[..at].ends_with(is_word));
                assert!(!found, "src/{file} names {extern_crate}");
            }
        }
    }
}

#[test]
fn unsafe_stays_behind_its_fence() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    assert!(lib.contains("#![deny(unsafe_code)]"), "src/lib.rs must deny unsafe_code");
    for (file, text) in sources() {
        let fenced =
            MAY_SAY_UNSAFE.iter().any(|may| file == *may || may.ends_with('/') && file.starts_with(may));
        let says = code(&text).split(|c: char| !is_word(c)).any(|word| word == "unsafe");
        assert!(fenced || !says, "src/{file} says unsafe; only {MAY_SAY_UNSAFE:?} may");
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut missing = Vec::new();
    for (file, text) in sources() {
        let code = code(&text);
        let shown: Vec<&str> = text.lines().collect();
        let lines: Vec<&str> = code.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if says_unsafe_block(line) && !has_reason(&shown, &lines, number, "SAFETY:") {
                missing.push(format!("src/{file}:{}: no SAFETY comment just above", number + 1));
            }
            if line.contains("unsafe fn ")
                && !line.contains("= unsafe fn")
                && !has_reason(&shown, &lines, number, "# Safety")
                && !has_reason(&shown, &lines, number, "SAFETY:")
            {
                missing.push(format!("src/{file}:{}: no `# Safety` section", number + 1));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// Whether a line of code opens an unsafe block or an unsafe impl.
fn says_unsafe_block(line: &str) -> bool {
    line.match_indices("unsafe").any(|(at, word)| {
        let next = line[at + word.len()..].trim_start();
        let alone = !line[..at].ends_with(is_word);
        alone && (next.starts_with('{') || next.starts_with("impl") || next.is_empty())
    })
}

/// Whether the comments just above the statement that line `number` belongs to contain `word`.
fn has_reason(shown: &[&str], code: &[&str], number: usize, word: &str) -> bool {
    for above in (0..=number).rev() {
        let comment = shown[above].split_once("//");
        if comment.is_some_and(|(_, comment)| comment.contains(word)) {
            return true;
        }
        let line = code[above].trim_end();
        let comment_or_attribute = line.trim().is_empty() || line.trim_start().starts_with("#[");
        // The end of an earlier statement: what stands above it belongs to that one.
        let earlier = above < number && (line.ends_with(';') || line.ends_with('{') || line.ends_with('}'));
        if earlier && !comment_or_attribute {
            return false;
        }
    }
    false
}

#[test]
fn file_names_say_what_is_inside() {
    let is_code = |name: &str| name.ends_with(".rs") || name.ends_with(".py") || name.ends_with(".pyi");
    for folder in ["src", "python", "tests", "benches", "examples"] {
        for path in files(&root().join(folder), &is_code) {
            let stem = path.file_stem().unwrap().to_string_lossy();
            assert!(!SAY_NOTHING.contains(&&*stem), "{} says nothing about what is in it", path.display());
        }
    }
}

mod the_reader {
    use super::*;

    #[test]
    fn leaves_out_comments_and_literals() {
        let text =
            "a // unsafe {\n/* crate::x /* y */ */ b \"crate::z \\\" \" 'u' '\\'' r#\"unsafe \" \"# &'a c\n";
        let seen = code(text);
        assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), ["a", "b", "&'a", "c"]);
        assert_eq!(seen.lines().count(), text.lines().count());
    }

    #[test]
    fn finds_names_in_paths_and_groups() {
        let text = "use crate::{pool::{Pool, Range}, simd, ops::matmul as m};\nlet x: crate::model::Model; mycrate::no;";
        let names: Vec<String> = named_after(text, "crate::").into_iter().collect();
        assert_eq!(names, ["model", "ops", "pool", "simd"]);
    }

    #[test]
    fn follows_re_exports_to_their_module() {
        let from = re_exports("mod error; pub use error::{Error, Result};\npub use config::Config;");
        assert_eq!(from["Error"], "error");
        assert_eq!(from["Config"], "config");
    }

    #[test]
    fn leaves_out_test_modules_only() {
        let kept = without_tests("use a;\n#[cfg(test)]\nmod tests {\n    use crate::x;\n}\nfn b() {}\n");
        assert_eq!(kept, "use a;\nfn b() {}\n");
    }

    #[test]
    fn sees_whether_a_block_has_its_reason() {
        let check = |text: &str| {
            let shown: Vec<&str> = text.lines().collect();
            let code = code(text);
            let lines: Vec<&str> = code.lines().collect();
            let at = lines.iter().position(|line| says_unsafe_block(line)).expect("an unsafe block");
            has_reason(&shown, &lines, at, "SAFETY:")
        };
        assert!(check("// SAFETY: x\nlet a =\n    unsafe { f() };"));
        assert!(check("// SAFETY: x\n// and y\n#[allow(unsafe_code)]\nunsafe impl Send for A {}"));
        assert!(!check("// SAFETY: of g\nlet b = g();\nlet a = unsafe { f() };"));
        assert!(!check("fn a() {\n    unsafe { f() }\n}"));
        assert!(!check("let a = unsafe { f(\"SAFETY:\") };"));
    }
}
