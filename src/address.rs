//! The address guard: to which addresses the agent may connect when a name or a URL was not written by
//! the operator. It judges the resolved address at the moment of connecting, so that neither the
//! spelling of a host nor a name that resolves anew gets around it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use ipnet::IpNet;

/// Which addresses may be connected to. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct AddressGuard {
    allow: Arc<[IpNet]>,
    own_listeners: Arc<[SocketAddr]>,
}

impl AddressGuard {
    /// A guard that lets global addresses and those in `allow` through, but never the agent's own
    /// listeners.
    pub fn new(allow: &[IpNet], own_listeners: Arc<[SocketAddr]>) -> Self {
        Self {
            allow: allow.into(),
            own_listeners,
        }
    }

    /// Whether `address` may be connected to.
    pub fn check(&self, address: IpAddr, port: u16) -> Result<(), AddressRefused> {
        let canonical = address.to_canonical();
        if self.is_own_listener(canonical, port) {
            return Err(AddressRefused::OwnListener(address));
        }
        let class = AddressClass::of(address);
        let allowed = class == AddressClass::Global
            || self
                .allow
                .iter()
                .any(|range| range.contains(&address) || range.contains(&canonical));
        match allowed {
            true => Ok(()),
            false => Err(AddressRefused::Class(address, class)),
        }
    }

    fn is_own_listener(&self, address: IpAddr, port: u16) -> bool {
        self.own_listeners.iter().any(|listener| {
            if listener.port() != port {
                return false;
            }
            let bound = listener.ip().to_canonical();
            bound == address
                || address.is_unspecified()
                || (bound.is_unspecified() && is_of_this_host(address))
        })
    }
}

/// Only an address of this host can be bound.
fn is_of_this_host(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// An address that the guard refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressRefused {
    /// The agent listens there itself, which no configuration permits.
    #[error("address `{0}` is one of the agent's own listeners")]
    OwnListener(IpAddr),
    /// Its class needs `allow_addresses`.
    #[error("address `{0}` {reason}", reason = .1.reason())]
    Class(IpAddr, AddressClass),
}

/// What an address is for (IANA special-purpose address registries; RFC 6890).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddressClass {
    /// Reachable through the internet.
    Global,
    /// This host.
    Loopback,
    /// This link.
    LinkLocal,
    /// RFC 1918 and RFC 4193.
    Private,
    /// A cloud's instance metadata or its like.
    Metadata,
    /// Shared address space, RFC 6598.
    CarrierGradeNat,
    /// One to many.
    Multicast,
    /// `0.0.0.0/8` and `::`, which connect to this host.
    Unspecified,
    /// RFC 5737 and RFC 3849.
    Documentation,
    /// Everything else that is not for use between hosts.
    Reserved,
}

/// Addresses at which clouds serve credentials or configuration to an instance.
const METADATA: [IpAddr; 9] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), // AWS, GCP, Azure and others
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),   // AWS ECS task credentials
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),  // AWS EKS pod identity
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),   // Azure wire server, in global space
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), // Alibaba
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),     // Oracle
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), // AWS
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)), // AWS EKS pod identity
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), // GCP
];

impl AddressClass {
    /// The class of an address. An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4) is judged as
    /// the IPv4 address that is reached.
    pub fn of(address: IpAddr) -> Self {
        match address {
            _ if METADATA.contains(&address) => Self::Metadata,
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        match address.octets() {
            [0, ..] => Self::Unspecified,
            [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Self::Private,
            [100, 64..=127, ..] => Self::CarrierGradeNat,
            [127, ..] => Self::Loopback,
            [169, 254, ..] => Self::LinkLocal,
            [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => Self::Documentation,
            // Protocol assignments, 6to4 relays, benchmarking.
            [192, 0, 0, _] | [192, 88, 99, _] | [198, 18..=19, ..] => Self::Reserved,
            [224..=239, ..] => Self::Multicast,
            [240..=255, ..] => Self::Reserved,
            _ => Self::Global,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        let embedded = |high: u16, low: u16| {
            let [a, b] = high.to_be_bytes();
            let [c, d] = low.to_be_bytes();
            Self::of(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))
        };
        match address.segments() {
            [0, 0, 0, 0, 0, 0, 0, 0] => Self::Unspecified,
            [0, 0, 0, 0, 0, 0, 0, 1] => Self::Loopback,
            // IPv4-mapped, RFC 4291 section 2.5.5.2.
            [0, 0, 0, 0, 0, 0xffff, high, low] => embedded(high, low),
            // NAT64, RFC 6052.
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
            // 6to4, RFC 3056.
            [0x2002, high, low, ..] => embedded(high, low),
            [0xfe80..=0xfebf, ..] => Self::LinkLocal,
            // Unique local, and the site-local addresses that they replaced.
            [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => Self::Private,
            [0xff00..=0xffff, ..] => Self::Multicast,
            [0x2001, 0xdb8, ..] | [0x3fff, 0..=0x0fff, ..] => Self::Documentation,
            // Protocol assignments, Teredo and benchmarking among them.
            [0x2001, 0..=0x01ff, ..] => Self::Reserved,
            // Global unicast, RFC 4291 section 2.4: nothing else has been handed out.
            [0x2000..=0x3fff, ..] => Self::Global,
            _ => Self::Reserved,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Global => "is not allowed",
            Self::Loopback => "is a loopback address",
            Self::LinkLocal => "is a link-local address",
            Self::Private => "is a private address",
            Self::Metadata => "is a cloud metadata address",
            Self::CarrierGradeNat => "is in the shared address space of providers",
            Self::Multicast => "is a multicast address",
            Self::Unspecified => "is an unspecified address",
            Self::Documentation => "is reserved for documentation",
            Self::Reserved => "is reserved",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let cases = [
            ("8.8.8.8", AddressClass::Global),
            ("172.15.255.255", AddressClass::Global),
            ("172.32.0.0", AddressClass::Global),
            ("100.63.255.255", AddressClass::Global),
            ("100.128.0.0", AddressClass::Global),
            ("2606:4700::1111", AddressClass::Global),
            ("2001:4860:4860::8888", AddressClass::Global),
            ("64:ff9b::808:808", AddressClass::Global),
            ("::ffff:8.8.8.8", AddressClass::Global),
            ("127.0.0.1", AddressClass::Loopback),
            ("127.255.255.254", AddressClass::Loopback),
            ("::1", AddressClass::Loopback),
            ("::ffff:127.0.0.1", AddressClass::Loopback),
            ("64:ff9b::7f00:1", AddressClass::Loopback),
            ("2002:7f00:1::", AddressClass::Loopback),
            ("169.254.0.1", AddressClass::LinkLocal),
            ("fe80::1", AddressClass::LinkLocal),
            ("febf::1", AddressClass::LinkLocal),
            ("10.0.0.1", AddressClass::Private),
            ("172.16.0.1", AddressClass::Private),
            ("172.31.255.255", AddressClass::Private),
            ("192.168.1.1", AddressClass::Private),
            ("fc00::1", AddressClass::Private),
            ("fdff::1", AddressClass::Private),
            ("fec0::1", AddressClass::Private),
            ("2002:a00:1::", AddressClass::Private),
            ("169.254.169.254", AddressClass::Metadata),
            ("::ffff:169.254.169.254", AddressClass::Metadata),
            ("64:ff9b::a9fe:a9fe", AddressClass::Metadata),
            ("168.63.129.16", AddressClass::Metadata),
            ("100.100.100.200", AddressClass::Metadata),
            ("fd00:ec2::254", AddressClass::Metadata),
            ("100.64.0.1", AddressClass::CarrierGradeNat),
            ("100.127.255.255", AddressClass::CarrierGradeNat),
            ("224.0.0.1", AddressClass::Multicast),
            ("ff02::1", AddressClass::Multicast),
            ("0.0.0.0", AddressClass::Unspecified),
            ("0.1.2.3", AddressClass::Unspecified),
            ("::", AddressClass::Unspecified),
            ("192.0.2.1", AddressClass::Documentation),
            ("2001:db8::1", AddressClass::Documentation),
            ("3fff::1", AddressClass::Documentation),
            ("255.255.255.255", AddressClass::Reserved),
            ("240.0.0.1", AddressClass::Reserved),
            ("198.18.0.1", AddressClass::Reserved),
            ("::127.0.0.1", AddressClass::Reserved),
            ("2001::1", AddressClass::Reserved),
            ("64:ff9b:1::1", AddressClass::Reserved),
            ("100::1", AddressClass::Reserved),
            ("4000::1", AddressClass::Reserved),
        ];
        for (text, expected) in cases {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(AddressClass::of(address), expected, "{text}");
        }
    }

    #[test]
    fn only_global_and_allowed_addresses_pass() {
        let guard = AddressGuard::new(&["127.0.0.0/8".parse().unwrap()], Arc::default());
        let check = |text: &str| guard.check(text.parse().unwrap(), 443);
        assert_eq!(check("8.8.8.8"), Ok(()));
        assert_eq!(check("127.0.0.1"), Ok(()));
        assert_eq!(check("::ffff:127.0.0.1"), Ok(()));
        assert!(check("::1").is_err());
        assert!(check("10.0.0.1").is_err());
        assert_eq!(
            check("169.254.169.254").unwrap_err().to_string(),
            "address `169.254.169.254` is a cloud metadata address"
        );
    }

    #[test]
    fn own_listeners_are_refused_in_every_spelling_even_where_the_range_is_allowed() {
        let allow = ["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        let own: Arc<[SocketAddr]> = Arc::new([
            "127.0.0.1:7523".parse().unwrap(),
            "0.0.0.0:7524".parse().unwrap(),
        ]);
        let guard = AddressGuard::new(&allow, own);
        let check = |text: &str, port| guard.check(text.parse().unwrap(), port).is_ok();
        assert!(!check("127.0.0.1", 7523));
        assert!(!check("::ffff:127.0.0.1", 7523));
        assert!(!check("0.0.0.0", 7523));
        assert!(!check("127.0.0.1", 7524));
        assert!(!check("127.9.9.9", 7524));
        assert!(check("127.0.0.1", 7525));
        assert!(check("127.0.0.2", 7523));
        assert!(check("8.8.8.8", 7524));
    }
}
