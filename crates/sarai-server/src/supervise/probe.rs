//! A dry run in a process of its own: what a load would take, by llama.cpp's own account.

use std::path::Path;
use std::time::Duration;

use sarai_core::frame::{FromWorker, LoadSpec, LoadedInfo, ToWorker};
use tokio::sync::mpsc;
use tracing::Level;

use super::child::{self, END_GRACE, ENVIRONMENT};
use super::route::Routes;

/// A vocabulary of 260,000 tokens takes a core three seconds.
const DEADLINE: Duration = Duration::from_secs(120);

/// Makes a dry run.
///
/// # Errors
/// The child cannot be started, took too long, or llama.cpp cannot load the file this way.
pub async fn probe(executable: &Path, spec: LoadSpec) -> Result<LoadedInfo, String> {
    let mut launched =
        child::launch(executable, ["probe", &spec.model], ENVIRONMENT).map_err(|error| error.to_string())?;
    let (commands, to_write) = mpsc::unbounded_channel();
    let last_words = tokio::spawn(child::read_log(launched.child.stderr.take(), spec.model.clone(), Level::DEBUG));
    let writing = tokio::spawn(child::write_frames(launched.writer, to_write, Routes::default()));
    let _ = commands.send(ToWorker::Load(spec));
    let answer = tokio::time::timeout(DEADLINE, child::next_frame(&mut launched.reader)).await;
    drop(commands);
    writing.abort();
    let status = child::end(&mut launched.child, END_GRACE).await;
    let words = last_words.await.unwrap_or_default();
    match answer {
        Ok(Some(FromWorker::Loaded(info))) => Ok(info),
        Ok(Some(FromWorker::LoadFailed(reason))) => Err(child::with_words(reason, &words)),
        Ok(_) => Err(child::with_words(status.map_or("lost".into(), |status| status.to_string()), &words)),
        Err(_) => Err(format!("it took longer than {} s", DEADLINE.as_secs())),
    }
}
