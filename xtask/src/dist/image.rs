//! `cargo xtask image`: a container image that holds the static binary and nothing else.

use std::{fs, process::Command};

use anyhow::{Context, Result, bail, ensure};

use super::VERSION;
use crate::{
    command::{self, say},
    ebpf,
    platform::Platform,
    tools,
    workspace::Workspace,
};

/// The maximum size of an image, in bytes.
const LIMIT: u64 = 15 << 20;

/// Capabilities of the binary, for users other than root. They are permitted and not effective: a file whose
/// capabilities are effective cannot even be executed in a container that lacks one of them.
const CAPABILITIES: &str = "cap_bpf,cap_perfmon,cap_sys_ptrace,cap_syslog,cap_net_admin,cap_sys_admin=p";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the image
    #[arg(long, value_name = "NAME", default_value = "tcpclose")]
    tag: String,
    /// The platform to build for, as rustc calls it, if it is not this one
    #[arg(long, value_name = "TRIPLE", value_parser = Platform::parse)]
    target: Option<&'static Platform>,
}

/// Builds the image with podman or docker.
pub(crate) fn image(workspace: &Workspace, args: &Args) -> Result<()> {
    let Some(engine) = command::find("podman").or_else(|| command::find("docker")) else {
        bail!("there is neither podman nor docker here; `sudo apt-get install podman` installs one");
    };
    ensure!(
        command::is_root(),
        "giving a file capabilities that count in containers takes root: run this as root, or with sudo -E"
    );
    let platform = args.target.unwrap_or_else(Platform::host);
    ebpf::build(workspace, &tools::for_building()?)?;
    let binary = super::build(workspace, platform)?;

    let context = workspace.target.join("dist/image");
    // The directory does not exist the first time.
    let _ = fs::remove_dir_all(&context);
    fs::create_dir_all(&context).with_context(|| format!("cannot create {}", context.display()))?;
    fs::copy(&binary, context.join("tcpclose"))?;
    command::run(Command::new("setcap").arg(CAPABILITIES).arg(context.join("tcpclose")))
        .context("the binary has no capabilities; `sudo apt-get install libcap2-bin` installs setcap")?;
    fs::write(context.join("Containerfile"), containerfile(workspace))?;

    let mut build = Command::new(&engine);
    build.args(["build", "--quiet", "--platform", &format!("linux/{}", platform.debian)]);
    build.args(["--tag", &format!("{}:{VERSION}", args.tag), "--tag", &format!("{}:latest", args.tag)]);
    build.arg("--file").arg(context.join("Containerfile")).arg(&context);
    command::run(&mut build)?;

    let mut inspect = Command::new(&engine);
    let size = command::output(inspect.args(["image", "inspect", "--format", "{{.Size}}", &args.tag]))
        .with_context(|| format!("this command failed: {}", command::line(&inspect)))?;
    let bytes: u64 =
        size.parse().with_context(|| format!("the size of the image is not a number: {size}"))?;
    ensure!(bytes < LIMIT, "the image has {bytes} bytes, and the limit is {LIMIT}");
    say(&format!("{}:{VERSION} for {} has {bytes} bytes", args.tag, platform.debian));
    Ok(())
}

fn containerfile(workspace: &Workspace) -> String {
    let mut git = Command::new("git");
    let revision =
        command::output(git.args(["rev-parse", "HEAD"]).current_dir(&workspace.root)).unwrap_or_default();
    format!(
        r#"FROM scratch
LABEL org.opencontainers.image.title="tcpclose" \
      org.opencontainers.image.description="{}" \
      org.opencontainers.image.version="{VERSION}" \
      org.opencontainers.image.revision="{revision}" \
      org.opencontainers.image.licenses="(MIT OR Apache-2.0) AND GPL-2.0-only"
COPY --chmod=0755 tcpclose /tcpclose
ENTRYPOINT ["/tcpclose"]
"#,
        "Tells who ended a TCP connection, how, why, and from which line of code"
    )
}
