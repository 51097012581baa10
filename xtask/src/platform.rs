//! The platforms that tcpclose is built for, and their names in Rust, Debian, QEMU and the kernel.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{apt::Package, command, compiler};

/// A platform. The only instances are in [`PLATFORMS`].
#[derive(Debug)]
pub(crate) struct Platform {
    /// The target triple in Rust.
    pub(crate) triple: &'static str,
    /// The architecture in Debian.
    pub(crate) debian: &'static str,
    /// The directory of its kernels in the user's cache.
    pub(crate) kernels: &'static str,
    /// The GNU triplet: the directory of its libraries, and the prefix of the tools that work on its files on
    /// other platforms.
    pub(crate) gnu: &'static str,
    /// The linker command and the library for cross-linking, each with the package that contains it.
    pub(crate) linker: [(&'static str, Package); 2],
    /// The compiler of 32-bit programs, with its package, if it is not the one of the platform's own
    /// programs.
    pub(crate) compiler_32: Option<(&'static str, Package)>,
    /// The compiler's option for 32-bit programs.
    pub(crate) option_32: &'static str,
    /// A file of the C library of the 32-bit programs that tests run on a host of this platform, with the
    /// package that contains it.
    pub(crate) library_32: Option<(&'static str, Package)>,
    /// The emulator, and the package that contains it.
    pub(crate) qemu: (&'static str, Package),
    /// The emulator's arguments for an emulated processor.
    pub(crate) emulated: &'static [&'static str],
    /// Its arguments for a machine that has one serial port.
    pub(crate) board: &'static [&'static str],
    /// Its device for a second serial port.
    pub(crate) second_port: &'static str,
    /// The kernel's names of both serial ports.
    pub(crate) ports: [&'static str; 2],
}

static PLATFORMS: [Platform; 2] = [
    Platform {
        triple: "x86_64-unknown-linux-gnu",
        debian: "amd64",
        kernels: "kernels",
        gnu: "x86_64-linux-gnu",
        linker: [
            (
                "x86_64-linux-gnu-gcc",
                Package { name: "gcc-x86-64-linux-gnu", purpose: "what links programs for amd64" },
            ),
            (
                "/usr/x86_64-linux-gnu/lib/crt1.o",
                Package { name: "libc6-dev-amd64-cross", purpose: "the C library that they are linked to" },
            ),
        ],
        compiler_32: None,
        option_32: "-m32",
        library_32: Some((
            "/usr/lib32/crt1.o",
            // Not gcc-multilib, which conflicts with the compilers of other platforms.
            Package {
                name: "libc6-dev-i386",
                purpose: "the C library of 32-bit programs, one of which a test runs",
            },
        )),
        qemu: (
            "qemu-system-x86_64",
            Package { name: "qemu-system-x86", purpose: "QEMU, in which tests run on other kernels" },
        ),
        // An old processor, because newer instructions are slow to emulate; without cmpxchg16b, after which
        // QEMU 7.2 sometimes has wrong flags, which crashes kernels.
        emulated: &["-cpu", "Nehalem,-cx16"],
        board: &[],
        second_port: "isa-serial",
        ports: ["ttyS0", "ttyS1"],
    },
    Platform {
        triple: "aarch64-unknown-linux-gnu",
        debian: "arm64",
        kernels: "kernels-arm64",
        gnu: "aarch64-linux-gnu",
        linker: [
            (
                "aarch64-linux-gnu-gcc",
                Package { name: "gcc-aarch64-linux-gnu", purpose: "what links programs for arm64" },
            ),
            (
                "/usr/aarch64-linux-gnu/lib/crt1.o",
                Package { name: "libc6-dev-arm64-cross", purpose: "the C library that they are linked to" },
            ),
        ],
        compiler_32: Some((
            "arm-linux-gnueabihf-gcc",
            Package {
                name: "gcc-arm-linux-gnueabihf",
                purpose: "a compiler for arm32, whose programs run on arm64",
            },
        )),
        // The instructions that the test program contains are those, not Thumb.
        option_32: "-marm",
        library_32: None,
        qemu: (
            "qemu-system-aarch64",
            Package { name: "qemu-system-arm", purpose: "QEMU, in which tests run on kernels for arm64" },
        ),
        // A processor without pointer authentication, which is slow to emulate.
        emulated: &["-cpu", "cortex-a72"],
        board: &["-machine", "virt,gic-version=max"],
        second_port: "pci-serial",
        ports: ["ttyAMA0", "ttyS0"],
    },
];

impl Platform {
    /// All supported platforms.
    pub(crate) fn all() -> impl Iterator<Item = &'static Self> {
        PLATFORMS.iter()
    }

    /// The platform that this program runs on.
    pub(crate) fn host() -> &'static Self {
        let is_this = |platform: &&Self| platform.triple.split('-').next() == Some(env::consts::ARCH);
        // On any other host, the entry only represents the host: cargo builds there without a target.
        PLATFORMS.iter().find(is_this).unwrap_or(&PLATFORMS[0])
    }

    /// Reads the argument of `--target`.
    pub(crate) fn parse(triple: &str) -> Result<&'static Self, String> {
        PLATFORMS.iter().find(|platform| platform.triple == triple).ok_or_else(|| {
            let known: Vec<_> = PLATFORMS.iter().map(|platform| platform.triple).collect();
            format!("known here: {}", known.join(", "))
        })
    }

    pub(crate) fn is_host(&self) -> bool {
        std::ptr::eq(self, Self::host())
    }

    /// Makes a cargo command build for this platform.
    pub(crate) fn choose(&self, cargo: &mut Command) {
        if !self.is_host() {
            self.choose_always(cargo);
        }
    }

    /// Same as [`Self::choose`], but names the platform to cargo even if it is the host's.
    pub(crate) fn choose_always(&self, cargo: &mut Command) {
        cargo.args(["--target", self.triple]);
        if !self.is_host() {
            let triple = self.triple.to_uppercase().replace('-', "_");
            cargo.env(format!("CARGO_TARGET_{triple}_LINKER"), self.tool("gcc"));
        }
    }

    /// The directory inside a target directory in which cargo puts builds for this platform.
    pub(crate) fn folder(&self, target: &Path) -> PathBuf {
        if self.is_host() { target.to_owned() } else { target.join(self.triple) }
    }

    /// The name of the binutils program that works on this platform's files.
    pub(crate) fn tool(&self, name: &str) -> String {
        if self.is_host() { name.to_owned() } else { format!("{}-{name}", self.gnu) }
    }

    /// Whether the compiler of the user half has the standard library for this platform.
    pub(crate) fn has_std(&self) -> bool {
        let mut rustc = Command::new("rustc");
        let folder = command::output(rustc.args(["--print", "target-libdir", "--target", self.triple]));
        folder.is_some_and(|folder| compiler::has_core(Path::new(&folder)))
    }
}
