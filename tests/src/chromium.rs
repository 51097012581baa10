//! Pictures and pages that tcpclose writes, as a browser shows them.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{netns::Namespace, netns::run};

/// The browser's program.
pub const CHROMIUM: &str = "/usr/bin/chromium";

/// A file in the browser, which has no network.
#[derive(Debug)]
pub struct Page<'a> {
    namespace: &'a Namespace,
    url: String,
    profile: PathBuf,
}

impl<'a> Page<'a> {
    /// The page of this file, with the part of an address after the question mark. The browser leaves its own
    /// files in `folder`.
    pub fn of(file: &Path, query: &str, namespace: &'a Namespace, folder: &Path) -> Self {
        let url = format!("file://{}{query}", file.display());
        Self { namespace, url, profile: folder.join("profile") }
    }

    fn chromium(&self, option: &str) -> Result<String> {
        let mut command = Command::new(CHROMIUM);
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2600"]);
        command.arg(format!("--user-data-dir={}", self.profile.display())).args([option, &self.url]);
        self.namespace.enter(&mut command)?;
        run(&mut command)
    }

    /// The elements of the page, after its scripts have run. With `TCPCLOSE_TESTS_SCREENSHOT=FILE` the browser
    /// also takes a picture.
    pub fn elements(&self) -> Result<String> {
        if let Some(file) = env::var_os("TCPCLOSE_TESTS_SCREENSHOT") {
            let file = file.into_string().ok().context("the name of the file is not text")?;
            self.chromium(&format!("--screenshot={file}"))?;
        }
        self.chromium("--dump-dom")
    }
}
