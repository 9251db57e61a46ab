//! The records a conversion keeps, so that one that was stopped can be resumed.
//!
//! Everything here lies in the staging folder and goes with it; nothing of it is part of a checkpoint.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{Source, SourceFile, Staging};
use crate::error::{Error, IoContext, Result};
use crate::manifest::Tool;
use crate::pipeline::FileOutcome;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::store::{Identity, Sha256Hash};

/// What is being made, and of what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobFingerprint {
    tool: Tool,
    recipe: Recipe,
    /// Whether the source is decoded rather than quantized.
    #[serde(default)]
    dequantize: bool,
    config_sha256: Option<Sha256Hash>,
    source_files: Vec<SourceMark>,
    /// Of the config of the adapter that is merged, if one is: its file is the last of the source's.
    #[serde(default)]
    adapter_config_sha256: Option<Sha256Hash>,
}

/// What every version has noted.
#[derive(Deserialize)]
struct Begun {
    tool: Tool,
}

/// What a source file is known by, without reading its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SourceMark {
    name: String,
    identity: Identity,
    header_sha256: Sha256Hash,
}

impl JobFingerprint {
    /// The execution of `plan`, which is of `source`.
    pub(crate) fn new(source: &Source, plan: &Plan) -> JobFingerprint {
        let mark = |file: &SourceFile| SourceMark {
            name: file.name.clone(),
            identity: file.identity.clone(),
            header_sha256: file.header_sha256,
        };
        JobFingerprint {
            tool: Tool::this(),
            recipe: plan.recipe.clone(),
            dequantize: plan.from_floats,
            config_sha256: source.config.as_ref().map(|config| config.sha256()),
            source_files: source.files.iter().map(mark).collect(),
            adapter_config_sha256: source.adapter.as_ref().map(|adapter| adapter.config_sha256),
        }
    }

    /// Takes up this job in `staging`: resumes it if it was begun there, and begins it if nothing was. Returns
    /// whether it was begun.
    ///
    /// # Errors
    /// When another job was begun there and `restart` isn't set.
    pub(crate) fn take_up(&self, staging: &Staging, restart: bool) -> Result<bool> {
        if let Some(begun) = staging.job()?.filter(|_| !restart) {
            let changed = |what| Err(Error::JobChanged { path: staging.folder().to_owned(), what });
            match (serde_json::from_slice::<JobFingerprint>(&begun), serde_json::from_slice::<Begun>(&begun)) {
                (Ok(begun), _) => return begun.difference(self).map_or(Ok(true), changed),
                (Err(_), Ok(Begun { tool })) => {
                    return changed(format!(
                        "it was begun by version {}, which noted its options otherwise",
                        tool.version
                    ));
                }
                // Nothing that any version writes.
                (Err(_), Err(_)) => {}
            }
        }
        let json =
            serde_json::to_vec_pretty(self).map_err(|error| Error::malformed(staging.folder(), error.to_string()))?;
        staging.begin(&json)?;
        Ok(false)
    }

    /// What the job `now` has otherwise than this one, in words.
    fn difference(&self, now: &JobFingerprint) -> Option<String> {
        if self.tool.version != now.tool.version {
            return Some(format!("it was begun by version {}, and this is {}", self.tool.version, now.tool.version));
        }
        if self.dequantize != now.dequantize {
            return Some("one decodes to floats, and the other doesn't".to_owned());
        }
        if let Some(what) = recipe_difference(&self.recipe, &now.recipe) {
            return Some(what);
        }
        if self.adapter_config_sha256 != now.adapter_config_sha256 {
            return Some(match (self.adapter_config_sha256, now.adapter_config_sha256) {
                (Some(_), Some(_)) => "the adapter's config has changed".to_owned(),
                _ => "one merges an adapter, and the other doesn't".to_owned(),
            });
        }
        if self.config_sha256 != now.config_sha256 {
            return Some("the source's config.json has changed".to_owned());
        }
        let names = |job: &JobFingerprint| job.source_files.iter().map(|file| file.name.clone()).collect::<Vec<_>>();
        if names(self) != names(now) {
            return Some("the source has other files".to_owned());
        }
        self.source_files.iter().zip(&now.source_files).find_map(|(then, now)| {
            let name = &now.name;
            let (before, after) = (&then.identity, &now.identity);
            if before.len != after.len {
                Some(format!("the source's {name} had {} bytes, and has {}", before.len, after.len))
            } else if then.header_sha256 != now.header_sha256 {
                Some(format!("the header of the source's {name} has changed"))
            } else if before != after {
                Some(format!("the source's {name} was written to since"))
            } else {
                None
            }
        })
    }
}

/// The first choice that differs.
fn recipe_difference(then: &Recipe, now: &Recipe) -> Option<String> {
    if then == now {
        return None;
    }
    let (then, now) = (json!(then), json!(now));
    let keys = [&then, &now].into_iter().filter_map(Value::as_object).flat_map(|recipe| recipe.keys());
    let value = |recipe: &Value, key: &str| recipe.get(key).map_or("not given".to_owned(), Value::to_string);
    let changed = keys.into_iter().find(|key| then.get(*key) != now.get(*key));
    Some(match changed {
        Some(key) => format!("{key} was {}, and is {}", value(&then, key), value(&now, key)),
        None => format!("its recipe was {then}, and is {now}"),
    })
}

/// Notes down the hash of a file of the source; if an earlier run had noted another one, the source has changed.
pub(crate) fn check_source_hash(staging: &Staging, file: &SourceFile, sha256: Sha256Hash) -> Result<()> {
    // Files of the source may lie in folders of it; notes don't.
    let name = format!("{}.source-sha256", file.name.replace('%', "%25").replace('/', "%2F"));
    match staging.sealed(&name)? {
        Some(noted) if noted != sha256.0 => {
            let why = format!("its content isn't what it was when the conversion began (SHA-256 {sha256} now)");
            Err(Error::SourceChanged { path: file.location.path().to_owned(), why })
        }
        Some(_) => Ok(()),
        None => staging.write_sealed(&name, |note| note.write_all(&sha256.0)),
    }
}

/// Notes down what is known of a finished file.
pub(crate) fn write_sealed(staging: &Staging, name: &str, outcome: &FileOutcome) -> Result<()> {
    staging.write_sealed(name, |file| serde_json::to_writer(file, outcome).map_err(Into::into))
}

/// What was noted down of a finished file; `None` if nothing was, or not to its end.
///
/// # Errors
/// When the system refuses to read it.
pub(crate) fn read_sealed(staging: &Staging, name: &str) -> Result<Option<FileOutcome>> {
    let Some(record) = staging.open_sealed(name)? else { return Ok(None) };
    match serde_json::from_reader(record) {
        Ok(outcome) => Ok(Some(outcome)),
        Err(error) if error.is_io() => Err(io::Error::from(error)).at(staging.folder(), "read its records"),
        Err(_) => Ok(None),
    }
}
