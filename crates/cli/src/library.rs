//! `drayman library`: the functions in Redis that every program calls.

use console::{Common, Failure, Out};
use queue_core::library::Version;
use serde_json::json;

use crate::cli::{LibraryArgs, LibraryCommand};

/// Shows the library's version, or loads it.
pub async fn run(common: &Common, args: LibraryArgs) -> Result<u8, Failure> {
    let (_, store) = common.connect().await?;
    if store.calls_scripts() {
        return Err(Failure::usage("redis.functions is false: no library is used"));
    }
    let mut out = Out::default();
    let (found, now) = match args.command.unwrap_or(LibraryCommand::Show) {
        LibraryCommand::Show => {
            let found = store.library_version().await?;
            (found, found)
        }
        LibraryCommand::Load => {
            let (found, now) = store.keep_library().await?;
            (found, Some(now))
        }
    };
    let text = |version: Option<Version>| version.map(|version| version.to_string());
    if common.json {
        out.json(&json!({ "found": text(found), "now": text(now), "program": Version::OURS.to_string() }));
        return Ok(console::OK);
    }
    let or_none = |version| text(version).unwrap_or_else(|| "none".into());
    out.line(format_args!("in Redis       {}", or_none(now)));
    if found != now {
        out.line(format_args!("before         {}", or_none(found)));
    }
    out.line(format_args!("this program   {}", Version::OURS));
    Ok(console::OK)
}
