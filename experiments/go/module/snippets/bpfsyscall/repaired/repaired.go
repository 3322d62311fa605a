// All but the command stands in a block of attributes, and its size is the third argument.
package snippet

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func bpfSyscall(cmd, fd int, key, value unsafe.Pointer, flags uint64) error {
	attributes := struct {
		fd         uint32
		_          uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(fd), key: key, value: value, flags: flags}
	_, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd),
		uintptr(unsafe.Pointer(&attributes)), unsafe.Sizeof(attributes))
	if errno != 0 {
		return errno
	}
	return nil
}
