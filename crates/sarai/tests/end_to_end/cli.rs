//! The command line: checking, exit codes, the environment, and talking to a server.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{BINARY, Sarai, smollm2};

fn sarai(args: &[&str], folder: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).current_dir(folder).env_remove("OLLAMA_BASE_URL").envs(variables.iter().copied());
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn the_shipped_configurations_have_no_mistakes() {
    for file in ["config/sarai.yaml", "config/demo.yaml"] {
        let checked = sarai(&["check", "--config", file], root(), &[]);
        assert!(checked.status.success(), "{}", text(&checked));
    }
}

#[test]
fn check_reports_every_mistake_at_once_with_line_key_and_fix() {
    let folder = tempfile::tempdir().unwrap();
    let config = "memory:\n  max_ram_gb: lots\n  strategy: hybrid\nmodels:\n  a:\n    backend: gguf_nativ\n    contxt_length: 5\n  b:\n    backend: gguf_native\n  c:\n    backend: ollama_http\n    url: ftp://x\n    aliases: [a]\n  d: { backend: gguf_native, gguf_path: x.gguf, shared_context: true, deterministic: true }\n";
    std::fs::write(folder.path().join("bad.yaml"), config).unwrap();
    let checked = sarai(&["check", "--config", "bad.yaml"], folder.path(), &[("MAX_CONCURRENT_LLMS", "many")]);
    let said = text(&checked);
    assert_eq!(checked.status.code(), Some(2), "{said}");
    for line in [
        "bad.yaml:2: memory.max_ram_gb: `lots` is not a number",
        "bad.yaml:3: memory.strategy: `hybrid` is unknown: use `hybrid_http_gguf`",
        "bad.yaml:6: models.a.backend: `gguf_nativ` is unknown: use `gguf_native`",
        "bad.yaml:7: models.a.contxt_length: is no key here: use `context_length`",
        "bad.yaml:8: models.b.gguf_path: is missing",
        "bad.yaml:12: models.c.url: `ftp://x` is not a URL",
        "bad.yaml:13: models.c.aliases: the name `a` belongs to `a` already",
        "bad.yaml:14: models.d.deterministic: cannot be kept beside `shared_context: true`: remove one of them",
        "MAX_CONCURRENT_LLMS: `many` is not a whole number",
    ] {
        assert!(said.contains(line), "{line}\nis not in\n{said}");
    }
    assert!(said.contains("\n9 mistakes in the configuration"), "and nothing twice: {said}");
}

#[test]
fn the_environment_goes_over_dotenv_and_both_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = "models:\n  solar:\n    backend: ollama_http\n    fallback: gguf_native\n    url: http://file:1\n    model_name: from-file\n    gguf_path: x.gguf\n";
    std::fs::write(folder.path().join("c.yaml"), config).unwrap();
    let check = |variables: &[(&str, &str)]| text(&sarai(&["check", "--config", "c.yaml"], folder.path(), variables));
    assert!(
        check(&[]).contains("solar: from-file on http://file:1, then ./x.gguf")
            || check(&[]).contains("solar: from-file on http://file:1, then x.gguf"),
        "{}",
        check(&[])
    );
    std::fs::write(folder.path().join(".env"), "OLLAMA_BASE_URL=http://dotenv:2\nSOLAR_MODEL_NAME=from-dotenv\n")
        .unwrap();
    assert!(check(&[]).contains("from-dotenv on http://dotenv:2"));
    assert!(check(&[("SOLAR_MODEL_NAME", "from-env")]).contains("from-env on http://dotenv:2"));
    let local_first = check(&[("SOLAR_PREFER_HTTP", "false")]);
    assert!(local_first.find("x.gguf").unwrap() < local_first.find("from-dotenv").unwrap(), "{local_first}");
}

#[test]
fn exit_codes_tell_what_went_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let code = |args: &[&str]| sarai(args, folder.path(), &[]).status.code();
    assert_eq!(code(&["--help"]), Some(0));
    assert_eq!(code(&["dance"]), Some(2));
    assert_eq!(code(&["serve", "--config", "none.yaml"]), Some(2));
    assert_eq!(code(&["ps", "--url", "http://127.0.0.1:1"]), Some(3));
    assert_eq!(code(&["run", "lfm2", "Hi", "--url", "http://127.0.0.1:1"]), Some(3));
}

#[test]
fn run_streams_an_answer_and_ps_shows_the_state_of_every_model() {
    let config = format!(
        "models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n  far: {{ backend: ollama_http, url: \"http://127.0.0.1:1\" }}\n  gone: {{ backend: gguf_native, gguf_path: /no/such.gguf }}\n",
        smollm2()
    );
    let server = Sarai::start(&config);
    let folder = server.folder.path();
    let asked = sarai(&["run", "lfm2", "Say", "hello.", "--url", &server.url], folder, &[]);
    assert!(asked.status.success() && asked.stdout.len() > 3, "{}", text(&asked));
    let unknown = sarai(&["run", "nobody", "Hi", "--url", &server.url], folder, &[]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown).contains("model 'nobody' not found"), "{}", text(&unknown));
    let ps = text(&sarai(&["ps", "--url", &server.url], folder, &[]));
    for shown in [
        "lfm2@gguf_native",
        "resident",
        "far@ollama_http(127.0.0.1:1)",
        "down",
        "cannot be reached",
        "unavailable",
        "/no/such.gguf",
    ] {
        assert!(ps.contains(shown), "{shown}\nis not in\n{ps}");
    }
}

#[test]
fn the_idle_server_holds_at_most_20_megabytes() {
    let server = Sarai::start("models:\n  lfm2: { backend: gguf_native, gguf_path: /no/such.gguf }\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib * 1024 <= 20_000_000, "{line}");
}

#[test]
fn sigint_ends_the_server_as_sigterm_does() {
    let mut server = Sarai::start("models:\n  lfm2: { backend: gguf_native, gguf_path: /no/such.gguf }\n");
    Command::new("kill").args(["-INT", &server.pid().to_string()]).status().unwrap();
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn the_log_is_json_when_it_is_not_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let file = std::fs::File::create(&path).unwrap();
    drop(Sarai::start_with("models:\n  m: { backend: gguf_native, gguf_path: /no/such.gguf }\n", file.into()));
    let log = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["message"] == "listening" && line["level"] == "INFO"), "{log}");
}

/// Starts a program on a pseudo terminal, as a person would.
fn on_a_terminal(command: &str, typed: &str) -> String {
    use std::io::Write;
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", command, "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    script.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    String::from_utf8_lossy(&script.wait_with_output().unwrap().stdout).into_owned()
}

#[test]
fn the_log_is_for_people_on_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("c.yaml"), "models:\n  m: { backend: gguf_native, gguf_path: /no/such.gguf }\n")
        .unwrap();
    // Taken, so that it says so and ends.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free =
        format!("cd {} && timeout 1 {BINARY} serve --config c.yaml --listen 127.0.0.1:0", folder.path().display());
    let said = on_a_terminal(&free, "");
    assert!(said.contains("listening") && !said.contains("{\"timestamp\""), "{said}");
    let address = taken.local_addr().unwrap();
    let busy = sarai(&["serve", "--config", "c.yaml", "--listen", &address.to_string()], folder.path(), &[]);
    assert_eq!(busy.status.code(), Some(1));
    assert!(text(&busy).contains(&format!("cannot listen on {address}")), "{}", text(&busy));
}

#[test]
fn run_converses_on_a_terminal_and_remembers_what_was_said() {
    let config =
        format!("models:\n  lfm2: {{ backend: gguf_native, gguf_path: {}, context_length: 512 }}\n", smollm2());
    let server = Sarai::start(&config);
    let said = on_a_terminal(
        &format!("{BINARY} run lfm2 --url {}", server.url),
        "My name is Ada. Say only hello.\nSay one word.\n\u{4}",
    );
    assert_eq!(said.matches(">>> ").count(), 3, "two questions and the end: {said}");
}
