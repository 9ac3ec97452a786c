//! `sarai plan`: files against llama.cpp's own dry run, and the tables of the reference set-up.
//!
//! `UPDATE_GOLDEN=1 cargo test --release -p sarai --test end_to_end plan::` writes the golden tables anew.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{BINARY, gemma, gguf, qwen, sketch, smollm2};
use serde_json::Value;

fn plan(arguments: &[&str]) -> String {
    let state = tempfile::tempdir().unwrap();
    let output =
        Command::new(BINARY).arg("plan").args(arguments).env("SARAI_STATE_DIR", state.path()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn plan_json(arguments: &[&str]) -> Value {
    let mut all = vec!["--json"];
    all.extend(arguments);
    serde_json::from_str(&plan(&all)).unwrap()
}

fn part(parts: &Value, name: &str) -> f64 {
    let found = parts.as_array().unwrap().iter().filter(|part| part["name"] == name);
    found.map(|part| part["bytes"].as_f64().unwrap()).sum()
}

/// Weights, caches and states are exact; scratch may differ by a hundredth of the whole.
fn assert_formula_is_the_dry_run(path: &str, settings: &[&str]) {
    let mut arguments = vec![path, "--probe"];
    arguments.extend(settings);
    let planned = &plan_json(&arguments)[0];
    let (formula, probe) = (&planned["formula"], &planned["probe"]);
    let total = planned["total_bytes"].as_f64().unwrap();
    let weights = part(formula, "weights mapped") + part(formula, "weights repacked");
    let probed = probe["weights"].as_f64().unwrap() + probe["repacked"].as_f64().unwrap();
    // Repacked tensors between used ones stay mapped beside their copies.
    assert!(weights >= probed * 0.999 && weights <= probed * 1.001 + part(formula, "weights repacked"), "{planned}");
    let repacked = part(formula, "weights repacked") - probe["repacked"].as_f64().unwrap();
    assert!(repacked.abs() < 1e5, "{path} {settings:?}: {planned}");
    let kept = part(formula, "kv") + part(formula, "state") - probe["context"].as_f64().unwrap();
    assert!(kept.abs() < total * 0.005, "{path} {settings:?}: {planned}");
    let scratch = part(formula, "compute") - probe["compute"].as_f64().unwrap();
    assert!(scratch.abs() < total * 0.01, "{path} {settings:?}: {planned}");
}

#[test]
fn the_formula_agrees_with_the_dry_run_on_real_files() {
    for path in [smollm2(), qwen(), gemma()] {
        for settings in [
            &[][..],
            &["--ctx", "8192", "--parallel", "2"],
            &["--kv", "q8_0"],
            &["--flash-attn", "off"],
            &["--repack", "off"],
        ] {
            assert_formula_is_the_dry_run(&path, settings);
        }
    }
}

#[test]
fn the_formula_agrees_with_the_dry_run_on_every_architecture() {
    for path in sketches() {
        if !path.to_string_lossy().contains("mmproj") {
            assert_formula_is_the_dry_run(&path.to_string_lossy(), &["--ctx", "2048"]);
            assert_formula_is_the_dry_run(&path.to_string_lossy(), &["--ctx", "1024", "--parallel", "4"]);
            let own_cells = ["--ctx", "1024", "--parallel", "4", "--deterministic"];
            assert_formula_is_the_dry_run(&path.to_string_lossy(), &own_cells);
        }
    }
}

/// Small files of each architecture; `scripts/sketch_models.py` makes them.
fn sketches() -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(sketch(".")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    files.sort();
    assert!(files.len() >= 16, "{files:?}");
    files
}

#[test]
fn a_projector_and_an_unknown_architecture_are_counted_and_said() {
    let of = |name: &str| sketches().into_iter().find(|path| path.to_string_lossy().contains(name)).unwrap();
    let (model, projector) = (of("/qwen2vl"), of("mmproj-qwen2.5o"));
    let with = plan_json(&[&model.to_string_lossy(), "--mmproj", &projector.to_string_lossy()]);
    assert!(part(&with[0]["parts"], "projector weights") > 8e6, "{with}");
    assert!(part(&with[0]["parts"], "projector compute") > 1e6, "{with}");

    // The same file under a name that nobody knows: all layers are counted, the note says so, and the dry run is tried.
    let folder = tempfile::tempdir().unwrap();
    let unknown = folder.path().join("unknown.gguf");
    let mut bytes = std::fs::read(of("/llama-")).unwrap();
    let at = bytes.windows(5).position(|window| window == b"llama").unwrap();
    bytes[at..at + 5].copy_from_slice(b"LLAMA");
    std::fs::write(&unknown, bytes).unwrap();
    let planned = &plan_json(&[&unknown.to_string_lossy()])[0];
    assert!(planned["notes"][0].as_str().unwrap().contains("`LLAMA` is not known"), "{planned}");
    assert!(planned["probe"]["failed"].is_string(), "{planned}");
    assert!(part(&planned["parts"], "weights mapped") > 1e6, "{planned}");
}

#[test]
fn the_parts_of_a_split_file_are_planned_together() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.gguf");
    gguf::lfm2().write(&whole);
    gguf::lfm2().write_split(folder.path(), "split");
    let plan_of = |path: &Path| plan_json(&[&path.to_string_lossy()])[0]["total_bytes"].as_u64().unwrap();
    let (whole, split) = (plan_of(&whole), plan_of(&folder.path().join("split-00001-of-00002.gguf")));
    // Where a repacked tensor lies in its file decides how much of it stays mapped.
    assert!(whole.abs_diff(split) < 8 << 20, "{whole} {split}");
    std::fs::remove_file(folder.path().join("split-00002-of-00002.gguf")).unwrap();
    let output =
        Command::new(BINARY).arg("plan").arg(folder.path().join("split-00001-of-00002.gguf")).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("split-00002-of-00002.gguf cannot be opened"));
    let renamed = folder.path().join("renamed.gguf");
    std::fs::rename(folder.path().join("split-00001-of-00002.gguf"), &renamed).unwrap();
    let output = Command::new(BINARY).arg("plan").arg(renamed).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("let it end in `-00001-of-00002.gguf`"), "{output:?}");
}

#[test]
fn a_file_that_is_none_and_an_argument_that_is_none_are_errors_that_name_them() {
    let fails = |arguments: &[&str], message: &str| {
        let output = Command::new(BINARY).arg("plan").args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(message), "{arguments:?}: {said}");
    };
    fails(&["/nowhere.gguf"], "/nowhere.gguf cannot be opened");
    fails(&["Cargo.toml"], "is not a GGUF file");
    fails(&["x.gguf", "--kv", "q3"], "`q3` is no type of cache");
    fails(&["x.gguf", "--ctx", "0"], "0 is not in 16..=16777216");
    fails(&["x.gguf", "--deterministic", "--shared-context"], "cannot be used with");
    fails(&["--ram", "lots"], "`lots` is no amount of memory");
}

#[test]
fn the_generated_headers_have_the_sizes_of_the_published_files() {
    assert_eq!(gguf::solar().bytes(), 6_460_923_904);
    assert_eq!(gguf::lfm2().bytes(), 728_509_440);
    assert_eq!(gguf::omni(7).bytes(), 4_677_120_000);
    assert_eq!(gguf::omni(3).bytes(), 2_098_976_768);
    assert_eq!(gguf::omni_projector(7).bytes(), 1_548_430_336);
    assert_eq!(gguf::omni_projector(3).bytes(), 1_537_973_248);
    assert_eq!(gguf::embedding_gemma().bytes(), 327_060_480);
}

fn reference(folder: &Path, name: &str, solar: &str, omni: u32, strategy: &str) {
    gguf::solar().write(&folder.join("solar.gguf"));
    gguf::lfm2().write(&folder.join("lfm2.gguf"));
    gguf::omni(omni).write(&folder.join("omni.gguf"));
    gguf::omni_projector(omni).write(&folder.join("mmproj.gguf"));
    gguf::embedding_gemma().write(&folder.join("embedding.gguf"));
    let config = format!(
        "memory:\n  max_ram_gb: 12\n  max_concurrent_llms: 2\n  strategy: {strategy}\nmodels:\n\
         \x20 solar:\n{solar}    gguf_path: solar.gguf\n    context_length: 4096\n    threads: 4\n\
         \x20 lfm2:\n    backend: gguf_native\n    gguf_path: lfm2.gguf\n    context_length: 8192\n    parallel: 4\n    threads: 4\n\
         \x20 omni:\n    backend: gguf_native\n    gguf_path: omni.gguf\n    mmproj_path: mmproj.gguf\n    context_length: 4096\n    threads: 4\n\
         \x20 embedding:\n    backend: gguf_native\n    role: embedding\n    gguf_path: embedding.gguf\n    context_length: 2048\n    resident: true\n    threads: 4\n"
    );
    let file = folder.join("sarai.yaml");
    std::fs::write(&file, config).unwrap();
    let table = plan(&["--config", &file.to_string_lossy(), "--ram", "16GiB"]);
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/end_to_end/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(golden.parent().unwrap()).unwrap();
        std::fs::write(&golden, &table).unwrap();
    }
    assert_eq!(table, std::fs::read_to_string(&golden).unwrap(), "{}", golden.display());
}

const HYBRID: &str = "    backend: ollama_http\n    fallback: gguf_native\n    url: http://192.168.1.50:11434\n";
const LOCAL: &str = "    backend: gguf_native\n";

#[test]
fn the_tables_of_the_reference_set_up_are_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    reference(folder.path(), "all_local_7b.txt", LOCAL, 7, "evict_lru");
    reference(folder.path(), "hybrid_7b.txt", HYBRID, 7, "evict_lru");
    reference(folder.path(), "hybrid_3b.txt", HYBRID, 3, "evict_lru");
    reference(folder.path(), "hybrid_7b_never_unload.txt", HYBRID, 7, "hybrid_http_gguf");
}
