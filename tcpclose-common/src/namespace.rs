//! The pid namespace of tcpclose, as the inventory finds it.

/// The value of `PID_NAMESPACE`; all zero until the inventory has run.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PidNamespace {
    /// Address of its `struct pid_namespace`.
    pub address: u64,
    /// The number of namespaces above it; 0 for the initial one.
    pub level: u32,
    /// Process id of tcpclose in the initial pid namespace.
    pub own: u32,
}

// SAFETY: `repr(C)`, integers only, and 8 + 4 + 4 bytes leave no padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for PidNamespace {}
